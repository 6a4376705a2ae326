#include "cuda_library.h"

namespace fusednorm_fastpath {

CudaLibrary cuda;

bool CudaLibrary::runs_on(const at::Tensor& tensor) const {
  const auto device = uint64_t(emulated ? 0 : tensor.get_device());
  return norms && device < 64 && (devices >> device & 1);
}

void attach_cuda(const CudaLibrary& library) {
  TORCH_CHECK(library.norms->abi == fusednorm::kNormsAbi && library.attentions->abi == fusednorm::kAttentionsAbi,
              "the fast path and libfusednorm_cuda.so are of different builds");
  cuda = library;
}

c10::DispatchKey device_key(bool by_cuda) {
  return by_cuda && !cuda.emulated ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
}

}  // namespace fusednorm_fastpath
