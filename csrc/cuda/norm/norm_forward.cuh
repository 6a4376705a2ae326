// The forward of every norm of the family: one body for LayerNorm and RMSNorm, with and without the epilogue.
//
// A row lies in the registers of its threads, a tile of it where it is too wide; narrow rows share a block. Without an
// epilogue there is but a residual, and one stride from row to row.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "../support/reduce.cuh"

namespace fusednorm_cuda {

// Most threads of a block, and least blocks of a multiprocessor, by vectors a thread: what registers are held to.
template <class T, class S, int CHUNKS, Epilogue EPILOGUE, bool ALIGNED>
struct ForwardBounds {
  static constexpr int kThreads = ALIGNED ? 128 * CHUNKS : 512;
  static constexpr bool kNarrow = sizeof(S) == sizeof(T) && sizeof(T) < 8;
  static constexpr int kPlain = CHUNKS == 1 ? (sizeof(T) < 8 ? 10 : 8) : CHUNKS == 2 ? 4 : kNarrow && kSinceHopper ? 2 : 1;
  static constexpr int kBlocks = !ALIGNED ? 1 : EPILOGUE == kNoEpilogue ? kPlain : CHUNKS == 1 ? 8 : CHUNKS == 2 ? 3 : 1;
};

// z of one vector, rounded to S.
template <class T, class S, int V, bool EPILOGUE, bool ALIGNED>
FN_DEVICE Raw<S, V> combine(const Forward& a, const Raw<T, V>& x, const Either<T, S, V>& residual, uint64_t seed, Path path,
                            int64_t row, int column, int64_t sample) {
  auto z = x.numbers();
  if constexpr (EPILOGUE) z = branch(At<T, V, ALIGNED>{a, seed, path, row, column, a.n_columns, sample}, z);
  return Raw<S, V>::of(a.residual.data ? residual.numbers(a.residual_is_narrow) + z : z);
}

template <class T, int V, bool ALIGNED>
FN_DEVICE void store_normed(const Forward& a, const Numbers<Compute<T>, V>& z, Compute<T> mean, Compute<T> rstd, int64_t row,
                            int column, int64_t sample) {
  using N = Numbers<Compute<T>, V>;
  N y = (z - N(mean)) * N(rstd);
  if (a.weight.data) {
    const N weight = load_parameter<T, V, ALIGNED>(a.weight, column, a.n_columns, sample);
    y = y * (a.zero_centered ? weight + N(1) : weight);
  }
  if (a.bias.data) y = y + load_parameter<T, V, ALIGNED>(a.bias, column, a.n_columns, sample);
  Raw<T, V>::of(y).template store<ALIGNED>(static_cast<T*>(a.normed) + row * a.n_columns, column, a.n_columns);
}

// Grid (groups of rows x ranks), of one sample after another where these have parameters; block (threads of a row, rows).
template <class T, class S, int CHUNKS, Epilogue EPILOGUE, bool ALIGNED>
FN_KERNEL((ForwardBounds<T, S, CHUNKS, EPILOGUE, ALIGNED>::kThreads), (ForwardBounds<T, S, CHUNKS, EPILOGUE, ALIGNED>::kBlocks))
add_layer_norm_fwd_kernel(FN_ARGUMENT Forward a) {
  using C = Compute<T>;
  constexpr int V = 16 / sizeof(T);
  constexpr bool HAS_EPILOGUE = EPILOGUE != kNoEpilogue, OF_SAMPLES = EPILOGUE == kSampleEpilogue;
  const int n = a.n_columns, threads = int(blockDim.x);
  const int rank = cluster_rank(), ranks = cluster_size();
  // No memory holds 2**32 rows of so many columns: registers are short.
  using Index = std::conditional_t<CHUNKS == 4, unsigned, int64_t>;
  const Part part = part_of<EPILOGUE>(a);
  const Index within = Index(part.block >> a.ranks_log2) * blockDim.y + threadIdx.y;
  const Index row = OF_SAMPLES ? Index(part.sample * a.rows_per_sample) + within : within;
  const bool active = within < (OF_SAMPLES ? a.rows_per_sample : a.n_rows);
  const int width = active ? n : 0;  // a row that is not there has no columns, but its threads meet the others
  const int span = threads * V * CHUNKS;
  const uint64_t seed = HAS_EPILOGUE && a.seed ? uint64_t(*a.seed) : 0;
  const Path path = HAS_EPILOGUE ? path_of(a, seed, row) : Path::kNone;
  const auto row_of = [&](const Rows& r) { return HAS_EPILOGUE ? row_at(r, row) : r.data + int64_t(row) * r.stride; };
  // Of no use where there is no such row: its width is 0.
  const char *const x_row = row_of(a.x), *const residual_row = row_of(a.residual);
  S* const z_row = static_cast<S*>(a.z) + (a.z ? int64_t(row) * n : 0);
  RowGroup<C> group(threads);

  Raw<S, V> z[CHUNKS];  // as it is stored: half the registers where that is in 16 bits
  C mean = 0, squares = 0;
#pragma unroll 1
  for (int tile = 0; tile < a.tiles; ++tile) {
    const int first = (tile * ranks + rank) * span + int(threadIdx.x) * V;
    Raw<T, V> x[CHUNKS];
    Either<T, S, V> residual[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) x[c] = Raw<T, V>::template load<ALIGNED>(x_row, first + c * threads * V, width);
    if (a.residual.data) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        residual[c].template load<ALIGNED>(a.residual_is_narrow, residual_row, first + c * threads * V, width);
    }
    C total[1] = {0};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = first + c * threads * V;
      z[c] = combine<T, S, V, HAS_EPILOGUE, ALIGNED>(a, x[c], residual[c], seed, path, row, column, part.sample);
      if (a.z) z[c].template store<ALIGNED>(z_row, column, width);
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (column + (ALIGNED ? 0 : i) < width) total[0] += C(z[c].get(i)) * C(a.tile_scale);
    }
    const int start = tile * ranks * span;
    const C count = C(n - start < ranks * span ? n - start : ranks * span);
    C tile_mean = 0;
    if (!a.rms) {
      group.sum(total);
      tile_mean = total[0] / (count * C(a.tile_scale));
    }
    C centred[1] = {0};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const C d = C(z[c].get(i)) - tile_mean;
        if (first + c * threads * V + (ALIGNED ? 0 : i) < width) centred[0] += d * d;
      }
    }
    group.sum(centred);
    // Merging with nothing, in the first tile, changes no bit. In this order: delta * delta alone may overflow where its
    // product with start = 0 must not.
    const C share = tile ? count / (C(start) + count) : C(1), delta = tile_mean - mean;
    mean += delta * share;
    squares += centred[0] + delta * (delta * (C(start) * share));
  }
  const C rstd = C(1) / sqrt(squares / C(n) + C(a.eps));
  if (threadIdx.x == 0 && rank == 0 && active) {
    C* const stats = static_cast<C*>(a.stats);
    if (!a.rms) stats[row] = mean;
    stats[(a.rms ? 0 : a.n_rows) + int64_t(row)] = rstd;
  }

#pragma unroll 1
  for (int tile = 0; tile < a.tiles; ++tile) {
    const int first = (tile * ranks + rank) * span + int(threadIdx.x) * V;
    if (a.tiles > 1) {  // what this thread stored, or x itself where nothing is stored
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = first + c * threads * V;
        if (a.z) {
          z[c] = Raw<S, V>::template load<ALIGNED>(z_row, column, width);
        } else {
          z[c] = Raw<S, V>::of(Raw<T, V>::template load<ALIGNED>(x_row, column, width).numbers());
        }
      }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = first + c * threads * V;
      if (column < width) store_normed<T, V, ALIGNED>(a, z[c].numbers(), mean, rstd, row, column, part.sample);
    }
  }
}

}  // namespace fusednorm_cuda
