// What the bindings of bias_act_dropout and of dropout_mask hand to the kernels: plain data, as in norm_args.h.
#pragma once

#include "../../common/activations.h"
#include "../norm/norm_args.h"

namespace fusednorm_cpu {

// Rows are cut into tiles of this many columns, so that few wide rows occupy all threads and workspaces stay in cache.
// A multiple of the four columns that one evaluation of Philox serves.
constexpr int64_t kTile = 4096;

struct Grid {
  int64_t n_rows, n_columns;
  int64_t row_tiles;  // tiles of a row
  uint64_t seed;
  Dropout element;
};

// Arithmetic is in the compute type C (float or double). The bias is an array of C, outputs are contiguous.
struct ActivationCall : Grid {
  Activation activation;
  bool direct;  // all rows, in and out, have unit stride and one dtype that C is made for
  bool wide;    // C is double
  Operand x, dy;
  const void* bias;
  void* out;  // y, or dx, in x's dtype; null where not wanted
  // Partial sums over the rows of a chunk, [chunk][column] of C, or null. A row's chunk depends on the shape alone.
  int64_t rows_per_chunk, partial_stride;
  void* partials;
};

// A workspace of workspace() bytes belongs to one thread at a time. Tiles are numbered along a row first; those of the
// backward along a chunk.
struct ActivationKernels {
  int64_t (*workspace)(const ActivationCall&);
  void (*forward)(const ActivationCall&, void* workspace, int64_t first_tile, int64_t end_tile);
  void (*backward)(const ActivationCall&, void* workspace, int64_t first_tile, int64_t end_tile);
  void (*mask)(const Grid&, bool* out, int64_t first_tile, int64_t end_tile);
};

}  // namespace fusednorm_cpu
