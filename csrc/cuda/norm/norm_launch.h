// The launches of the norm kernels, one set for each pair of dtypes that rows may have.
#pragma once

#include "norm_args.h"

namespace fusednorm_cuda {

// `cuda_stream` is a cudaStream_t; the emulation has none.
struct Launchers {
  void (*forward)(const Forward&, const Form&, Epilogue epilogue, void* cuda_stream);
  void (*backward)(const Backward&, const Form&, Epilogue epilogue, int programs, void* cuda_stream);
  int (*shared_bytes)(const Form&);  // of a block of the backward
  int (*resident_clusters)(const Form&, Epilogue epilogue, int device, int processors);  // of the backward
};

// Of rows x, normed and the residual of one dtype, or 16-bit rows beside a float32 residual.
Launchers float64_launchers();
Launchers float32_launchers();
Launchers bfloat16_launchers(bool float32_residual);
Launchers float16_launchers(bool float32_residual);

}  // namespace fusednorm_cuda
