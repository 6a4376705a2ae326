// What the bindings hand to the kernels: plain data.
#pragma once

#include "../data.h"

namespace fusednorm_cuda {

using namespace fusednorm;

// A tensor as rows of columns that lie one after another; strides in bytes. Absent when data is null.
struct Rows {
  const char* data;
  int64_t stride;
  int64_t outer, inner;  // a second stride, taken every `inner` rows; inner is 0 where there is none
};

// A parameter, of the row dtype T, or where `wide` of the compute type. Absent when data is null.
struct Parameter {
  const void* data;
  bool wide;
};

// How threads share a row. A tile is `ranks * threads * chunks` vectors, of 16 bytes of the row dtype.
struct Form {
  bool aligned;  // rows and parameters are read and written 16 bytes at a time
  int chunks;    // vectors a thread
  int threads;   // of one block for one row: a power of two up to a warp, then whole warps
  int rows;      // a block
  int ranks;     // blocks of a cluster for one row
  int tiles;     // in a row
};

struct Common {
  int64_t n_rows;
  int64_t rows_per_sample;  // rows under one index of dimension 0
  int n_columns;
  bool rms, zero_centered;
  Dropout element, path;
  const int64_t* seed;
  Parameter weight, bias, x_bias, layer_scale;
};

// Outputs are contiguous, and absent ones are null.
struct Forward : Common {
  Rows x, residual;
  void *normed, *z, *stats;
  double eps;
  double tile_scale;  // a power of two: sums of a tile's columns scaled by it do not overflow
  int tiles;
};

struct Backward : Common {
  Rows dnormed, dresidual_out, saved, x;
  bool saved_is_normed;
  const void* stats;
  void* sums;  // row means made before, where a block sees only a slab of each row
  void *dx, *dresidual;
  void* partials;  // (sums over rows, programs, columns)
  int dweight, dbias, dx_bias, dlayer_scale;  // which of the sums, or -1
};

struct Finalize {
  const void* partials;
  int programs, n_columns;
  void* gradient[4];  // of each of the sums
  Dtype dtype[4];
};

}  // namespace fusednorm_cuda
