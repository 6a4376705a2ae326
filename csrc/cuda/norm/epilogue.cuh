// What the epilogue (common/epilogue.h) finds at a vector of columns.
#pragma once

#include "../../common/epilogue.h"
#include "norm_args.h"
#include "../support/philox.cuh"
#include "../support/values.cuh"

namespace fusednorm_cuda {

// Which sample a block has, and which of its blocks along x it is. Sample 0 has them all where it does not matter.
struct Part {
  int64_t sample;
  unsigned block;
};

template <Epilogue EPILOGUE, class Arguments>
FN_DEVICE Part part_of(const Arguments& a) {
  if (EPILOGUE != kSampleEpilogue) return {0, blockIdx.x};
  const unsigned blocks = unsigned(a.blocks_per_sample), sample = blockIdx.x / blocks;
  return {int64_t(sample), blockIdx.x - sample * blocks};
}

FN_DEVICE Path path_of(const Common& a, uint64_t seed, int64_t row) {
  if (!a.path.on) return Path::kNone;
  const uint64_t sample = uint64_t(row / a.rows_per_sample);
  uint32_t c[4] = {0, uint32_t(sample), uint32_t(sample >> 32), kPathPhiloxOffset};
  philox<Word>(c, seed);
  return c[0] >= a.path.threshold ? Path::kKept : Path::kDropped;
}

// Without `EVERYTHING` there is neither layer scale nor drop path.
template <class T, int V, bool ALIGNED, bool EVERYTHING = true>
struct At {
  using C = Compute<T>;
  using N = Numbers<C, V>;
  const Common& a;
  uint64_t seed;
  Path row_path;
  int64_t row;
  int column, width;  // of the row: 0 where there is none
  int64_t sample;     // 0 where all share the layer scale

  FN_DEVICE bool has_x_bias() const { return a.x_bias.data; }
  FN_DEVICE bool has_layer_scale() const { return EVERYTHING && a.layer_scale.data; }
  FN_DEVICE bool drops() const { return a.element.on; }
  FN_DEVICE Path path() const { return EVERYTHING ? row_path : Path::kNone; }
  FN_DEVICE N x_bias() const { return load_parameter<T, V, ALIGNED>(a.x_bias, column, a.n_columns); }
  FN_DEVICE N layer_scale() const { return load_parameter<T, V, ALIGNED>(a.layer_scale, column, a.n_columns, sample); }
  FN_DEVICE C element_scale() const { return C(a.element.scale); }
  FN_DEVICE C path_scale() const { return C(a.path.scale); }
  FN_DEVICE N kept(N v) const { return v.kept(kept_columns<V>(seed, row, column, a.element.threshold)); }
  FN_DEVICE void add(N& sum, const N& v) const {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (column + (ALIGNED ? 0 : i) < width) sum[i] += v[i];
  }
};

}  // namespace fusednorm_cuda
