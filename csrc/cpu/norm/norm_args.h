// What the bindings hand to the kernels: plain data, without inline functions (data.h says why).
#pragma once

#include "../../common/checked.h"
#include "../../common/data.h"

namespace fusednorm_cpu {

using namespace fusednorm;

// Elements of a row of a workspace: whole vectors may be read and written past a row's end.
FN_CHECKED int64_t padded(int64_t n) { return plus(n, 95) / 64 * 64; }

constexpr int kRowBlock = 4;  // rows that are taken together over the columns

// A tensor as rows of columns. Absent when data is null.
struct Operand {
  const char* data;
  Dtype dtype;
  bool unit;  // the columns of a row lie one after another
  int row_dims, col_dims;
  Dim rows[kMaxDims], cols[kMaxDims];
};

// Arithmetic is in the compute type C (float or double). Parameters are arrays of C with zero-centering done, outputs
// are contiguous, and absent ones are null.
struct Common {
  int64_t n_rows, n_columns;
  int64_t rows_per_sample;  // rows under one index of dimension 0
  int64_t mask_columns;     // size of the last dimension, which masks count along
  Dtype row_dtype;          // what `direct` rows have
  bool direct;              // all rows, in and out, have unit stride and one dtype that C is made for
  bool wide;                // C is double
  bool epilogue;            // anything but the addition stands between x and z
  bool rms;
  bool nontemporal;  // rows are written past the caches: they and their tensors begin at multiples of 64 bytes
  uint64_t seed;
  Dropout element, path;
  const void *weight, *bias, *x_bias, *layer_scale;
};

struct Forward : Common {
  Operand x, residual;
  void *normed, *z, *stats;
  bool parameters_as_rows;  // weight and bias are not arrays of C but of the rows' dtype
  Dtype normed_dtype, z_dtype;
  double eps;
};

struct Backward : Common {
  Operand dnormed, dresidual_out, saved, x;
  bool saved_is_normed;
  const void* stats;
  void *dx, *dresidual;
  Dtype dx_dtype, dresidual_dtype;
  // Partial sums over the rows of a chunk: [chunk][sum][column] of C. Which chunk a row belongs to depends on the shape
  // alone, so the sums do not depend on the number of threads.
  int64_t rows_per_chunk, partial_stride;
  int64_t group_rows, group_chunks;  // chunks end where groups do, which are samples, or one group of all rows
  void* partials;
  int n_sums;
  int sum_dweight, sum_dbias, sum_dx_bias, sum_dlayer_scale;  // index of the sum, or -1
};

// One sum over rows: that of chunk c's rows begins at element c * step.
struct Partials {
  const void* sums;
  int64_t n_chunks, step;
  bool wide;  // they are double
};

struct ActivationKernels;
struct AttentionKernels;
struct LinearKernels;

// One instruction set's kernels. A workspace of *_workspace() bytes belongs to one thread at a time.
struct Kernels {
  const char* name;
  int64_t (*forward_workspace)(const Forward&);
  void (*forward)(const Forward&, void* workspace, int64_t first_row, int64_t end_row);
  int64_t (*backward_workspace)(const Backward&);
  void (*backward)(const Backward&, void* workspace, int64_t first_chunk, int64_t end_chunk);
  void (*reduce)(const Partials&, Dtype dtype, void* out, int64_t begin, int64_t end);
  void (*parameter)(const Operand&, int64_t sample, int64_t n, bool wide, double shift, void* out);
  const ActivationKernels* activation;
  const AttentionKernels* attention;
  const LinearKernels* linear;
};

}  // namespace fusednorm_cpu
