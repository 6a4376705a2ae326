// A launch that tells whether kernels of this library run on a GPU at all.
#pragma once

namespace fusednorm_cuda {

// On the current device; returns when it has ended, throws what the driver says against it.
void first_launch(void* cuda_stream);

}  // namespace fusednorm_cuda
