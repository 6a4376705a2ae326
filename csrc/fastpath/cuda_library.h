// The CUDA library, to which the fast path is not linked.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/attention_call.h"

namespace fusednorm_fastpath {

// Once attached it stays loaded.
struct CudaLibrary {
  const fusednorm::Norms* norms = nullptr;
  const fusednorm::Attentions* attentions = nullptr;
  bool emulated = false;  // for tests: it takes tensors on the CPU
  uint64_t devices = 0;   // a bit for each GPU on which its kernels run

  // Whether it is there, and its kernels run where the tensor is.
  bool runs_on(const at::Tensor& tensor) const;
};
extern CudaLibrary cuda;

void attach_cuda(const CudaLibrary& library);

// Of tensors for the CUDA library, or for the CPU's.
c10::DispatchKey device_key(bool by_cuda);

}  // namespace fusednorm_fastpath
