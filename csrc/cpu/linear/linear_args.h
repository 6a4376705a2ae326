// What the kernels of linear layers are called with.
#pragma once

#include "../norm/norm_args.h"

namespace fusednorm_cpu {

// out[r][n] = sum_k x[r][k] weight[n][k] + bias[n] for a few rows, all dense and of one dtype.
struct FewRows {
  const void *x, *weight, *bias;  // bias may be null
  void* out;
  int64_t rows, outputs, terms;
  Dtype dtype;
};

constexpr int64_t kOutputs = 4;  // outputs of one step: so many rows of the weight are read side by side

struct LinearKernels {
  void (*transpose_columns)(const float* in, int64_t rows, int64_t columns, int64_t first, int64_t end, float* out);
  int64_t (*few_rows_workspace)(const FewRows&);
  // steps from `begin` to `end`
  void (*few_rows)(const FewRows&, void* workspace, int64_t begin, int64_t end);
};

}  // namespace fusednorm_cpu
