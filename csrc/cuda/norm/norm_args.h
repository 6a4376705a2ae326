// What the bindings hand to the kernels: plain data.
#pragma once

#include "../support/args.h"

namespace fusednorm_cuda {

// What a kernel takes beside a residual: nothing; everything; everything, with a weight, bias or layer scale that is one
// vector for each sample.
enum Epilogue { kNoEpilogue, kEpilogue, kSampleEpilogue };

struct Common {
  int64_t n_rows;
  int64_t rows_per_sample;  // rows under one index of dimension 0
  int n_columns;
  bool rms, zero_centered;
  bool residual_is_narrow;  // the residual, or its gradient, has the dtype of x beside a wider residual stream
  Dropout element, path;
  const int64_t* seed;
  Parameter weight, bias, x_bias, layer_scale;
};

// Outputs are contiguous, and absent ones are null.
struct Forward : Common {
  Rows x, residual;
  void *normed, *z, *stats;
  double eps;
  float tile_scale;  // a power of two: sums of a tile's columns scaled by it do not overflow
  int tiles;
  int ranks_log2;  // of the form
  int blocks_per_sample;  // along x; 0 where no parameter is one vector for each sample
};

struct Backward : Common {
  Rows dnormed, dresidual_out, saved, x;
  bool saved_is_normed;
  const void* stats;
  void* sums;  // row means made before, where a block sees only a slab of each row
  void *dx, *dresidual;
  void* partials;  // (sums over rows, programs, columns)
  int rounds;  // rows that a thread visits, or would if there were as many
  float share;  // 1 / n_columns
  int dweight, dbias, dx_bias, dlayer_scale;  // which of the sums, or -1
  int blocks_per_sample;  // as in the forward
};

}  // namespace fusednorm_cuda
