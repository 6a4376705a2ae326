// The backward of every norm of the family, persistent over rows.
//
// With xhat = (z - mean) rstd, g = weight * dy and bars for row means,
// dz = rstd (g - bar(g) - xhat bar(g xhat)) + dresidual_out; RMSNorm lacks bar(g).
// Parameter gradients are summed in registers over the rows of a block, written once, and added by another kernel: no
// atomics. A thread holds one vector of a row, whatever the width: wider rows take more threads, then the blocks of a
// cluster, then slabs of columns, for which the row means are made before.
#pragma once

#include "epilogue.cuh"
#include "partials.cuh"
#include "reduce.cuh"

namespace fusednorm_cuda {

constexpr int kBackwardThreads = 512;  // 128 registers each
constexpr int kSumsThreads = 256;

template <class C>
struct RowStatistics {
  C mean, rstd;
};

template <class C>
FN_DEVICE RowStatistics<C> row_statistics(const Backward& a, int64_t row) {
  const C* const stats = static_cast<const C*>(a.stats);
  return {a.rms ? C(0) : stats[row], stats[(a.rms ? 0 : a.n_rows) + row]};
}

// The normalized row and g; both are zero past the row's end.
template <class T, class S, int V, bool ALIGNED>
FN_DEVICE void xhat_and_g(const Backward& a, const Raw<T, V>& dnormed, const Either<T, S, V>& saved,
                          const RowStatistics<Compute<T>>& stats, int column, int width, Numbers<Compute<T>, V>& xhat,
                          Numbers<Compute<T>, V>& g) {
  using C = Compute<T>;
  using N = Numbers<C, V>;
  N weight;
  g = dnormed.numbers();
  if (a.weight.data) {
    weight = load_parameter<T, V, ALIGNED>(a.weight, column, a.n_columns);
    if (a.zero_centered) weight = weight + N(1);
    g = g * weight;
  }
  xhat = saved.numbers(a.saved_is_normed);
  if (a.saved_is_normed) {
    if (a.bias.data) xhat = xhat - load_parameter<T, V, ALIGNED>(a.bias, column, a.n_columns);
    if (a.weight.data) xhat = xhat / weight;
  } else {
    xhat = (xhat - N(stats.mean)) * N(stats.rstd);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const bool inside = column + (ALIGNED ? 0 : i) < width;
    xhat[i] = inside ? xhat[i] : C(0);
    g[i] = inside ? g[i] : C(0);
  }
}

// The row means of g xhat and g, for rows too wide to hold. Grid (rows), block (threads).
template <class T, class S, bool ALIGNED>
FN_KERNEL(kSumsThreads, 2)
add_layer_norm_bwd_sums_kernel(FN_ARGUMENT Backward a) {
  using C = Compute<T>;
  constexpr int V = 16 / sizeof(T);
  const int n = a.n_columns;
  const int64_t row = blockIdx.x;
  const RowStatistics<C> stats = row_statistics<C>(a, row);
  const char *const dnormed_row = row_at(a.dnormed, row), *const saved_row = row_at(a.saved, row);
  RowGroup<C> group(int(blockDim.x));
  C sums[2] = {0, 0};
#pragma unroll 1
  for (int column = int(threadIdx.x) * V; column < n; column += int(blockDim.x) * V) {
    const auto dnormed = Raw<T, V>::template load<ALIGNED>(dnormed_row, column, n);
    Either<T, S, V> saved;
    saved.template load<ALIGNED>(a.saved_is_normed, saved_row, column, n);
    Numbers<C, V> xhat, g;
    xhat_and_g<T, S, V, ALIGNED>(a, dnormed, saved, stats, column, n, xhat, g);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[0] += g[i] * xhat[i], sums[1] += g[i];
  }
  group.sum(sums);
  if (threadIdx.x == 0) {
    C* const out = static_cast<C*>(a.sums);
    out[row] = sums[0] / C(n);
    out[a.n_rows + row] = sums[1] / C(n);
  }
}

// Whether the next row is on its way while the threads of this one meet: with the epilogue there are no registers for it.
template <bool EPILOGUE>
constexpr bool kPrefetch = !EPILOGUE;

// Grid (slabs, or ranks of a cluster; programs), block (threads of a row, rows).
template <class T, class S, bool EPILOGUE, bool ALIGNED>
FN_KERNEL(kBackwardThreads, 1)
add_layer_norm_bwd_kernel(FN_ARGUMENT Backward a) {
  using C = Compute<T>;
  constexpr int V = 16 / sizeof(T);
  using N = Numbers<C, V>;
  const int n = a.n_columns, column = int(blockIdx.x * blockDim.x + threadIdx.x) * V;
  RowGroup<C> group(int(blockDim.x));
  N dweight(0), dbias(0);
  [[maybe_unused]] N dx_bias(0), dlayer_scale(0);

  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  const int64_t rounds = (a.n_rows + step - 1) / step;  // the same for every thread: they meet at barriers
  int64_t next_row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  Raw<T, V> dnormed;
  Either<T, S, V> saved;
  RowStatistics<C> stats{};
  const auto load_next = [&] {
    const int width = next_row < a.n_rows ? n : 0;
    stats = width ? row_statistics<C>(a, next_row) : RowStatistics<C>{0, 0};
    dnormed = Raw<T, V>::template load<ALIGNED>(width ? row_at(a.dnormed, next_row) : nullptr, column, width);
    saved.template load<ALIGNED>(a.saved_is_normed, width ? row_at(a.saved, next_row) : nullptr, column, width);
    next_row += step;
  };
  if (kPrefetch<EPILOGUE>) load_next();

#pragma unroll 1
  for (int64_t round = 0; round < rounds; ++round) {
    if (!kPrefetch<EPILOGUE>) load_next();
    const int64_t row = next_row - step;
    const int width = row < a.n_rows ? n : 0;  // a row that is not there has no columns, but its threads meet the others
    // read for each row, because the round keys made of it would otherwise lie in registers all along
    [[maybe_unused]] const uint64_t seed = EPILOGUE && a.seed ? uint64_t(*a.seed) : 0;
    // here, because its division takes registers that are free only here
    [[maybe_unused]] const Path path = EPILOGUE ? path_of(a, seed, row) : Path::kNone;
    Raw<S, V> dresidual_out;
    if (a.dresidual_out.data)
      dresidual_out = Raw<S, V>::template load<ALIGNED>(width ? row_at(a.dresidual_out, row) : nullptr, column, width);
    N xhat, g;
    C means[2] = {0, 0};
    xhat_and_g<T, S, V, ALIGNED>(a, dnormed, saved, stats, column, width, xhat, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dweight[i] += C(dnormed.get(i)) * xhat[i];
      dbias[i] += C(dnormed.get(i));
      means[0] += g[i] * xhat[i];
      means[1] += g[i];
    }
    const C rstd = stats.rstd;
    if (kPrefetch<EPILOGUE>) load_next();  // on its way while the threads of this row meet

    if (a.sums) {
      const C* const made = static_cast<const C*>(a.sums);
      means[0] = width ? made[row] : C(0);
      means[1] = width ? made[a.n_rows + row] : C(0);
    } else {
      group.sum(means);
      means[0] /= C(n), means[1] /= C(n);
    }
    if (a.rms) means[1] = 0;
    N d = (g - xhat * N(means[0]) - N(means[1])) * N(rstd);
    if (a.dresidual_out.data) d = d + dresidual_out.numbers();
    if (a.dresidual) Either<T, S, V>::template store<ALIGNED>(d, a.residual_is_narrow, a.dresidual, row * n, column, width);
    if constexpr (EPILOGUE) {
      const auto x = [&] {
        return Raw<T, V>::template load<ALIGNED>(width ? row_at(a.x, row) : nullptr, column, width).numbers();
      };
      const At<T, V, ALIGNED> at{a, seed, path, row, column, width};
      d = branch_gradient(at, d, x, true, a.dlayer_scale >= 0, dx_bias, dlayer_scale);
    }
    if (a.dx) Raw<T, V>::of(d).template store<ALIGNED>(static_cast<T*>(a.dx) + row * n, column, width);
  }
  const auto write = [&](int plane, N& sums) {
    write_partials<ALIGNED>(a.partials, plane, column, n, RowGroup<C>::kSharedBytes, sums);
  };
  write(a.dweight, dweight);
  write(a.dbias, dbias);
  if constexpr (EPILOGUE) {
    write(a.dx_bias, dx_bias);
    write(a.dlayer_scale, dlayer_scale);
  }
}

}  // namespace fusednorm_cuda
