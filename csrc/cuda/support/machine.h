// What the ops ask of the machine: a GPU, or the emulation, which defines FN_EMULATED.
#pragma once

#include "forms.h"

#if defined(FN_EMULATED)

#define FN_DISPATCH_KEY CPU

namespace fusednorm_cuda {

// Makes a device of the emulation the current one; launches there may be made to fail.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();

 private:
  int before_;
};

Limits limits(int device);  // of the emulation: what tests ask for
inline void* current_cuda_stream(int) { return nullptr; }

}  // namespace fusednorm_cuda

#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define FN_DISPATCH_KEY CUDA

namespace fusednorm_cuda {

using OnDevice = torch::stable::accelerator::DeviceGuard;

Limits limits(int device);

inline void* current_cuda_stream(int device) {
  void* cuda_stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &cuda_stream));
  return cuda_stream;
}

}  // namespace fusednorm_cuda

#endif
