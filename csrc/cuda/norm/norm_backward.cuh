// The backward of every norm of the family, persistent over rows.
//
// With xhat = (z - mean) rstd, g = weight * dy and bars for row means,
// dz = rstd (g - bar(g) - xhat bar(g xhat)) + dresidual_out; RMSNorm lacks bar(g).
// Parameter gradients are summed in registers over the rows of a block, written once, and added by another kernel: no
// atomics. A thread holds one vector of a row, whatever the width: wider rows take more threads, then the blocks of a
// cluster, then slabs of columns, for which the row means are made before. Rows are fetched several ahead.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "../support/partials.cuh"
#include "../support/reduce.cuh"

namespace fusednorm_cuda {

constexpr int kBackwardThreads = 512;
constexpr int kSumsThreads = 256;

// How rows are read. Those that came through shared memory lie one stride apart, with neither layer scale nor drop path
// nor a z that is made of the output: what is left takes few enough registers for two blocks a multiprocessor.
enum Access { kStaged, kVectors, kElements };

// Least blocks of kBackwardThreads on a multiprocessor: what registers are held to.
template <class T, class S, Access ACCESS, Epilogue EPILOGUE>
constexpr int kBackwardBlocks = ACCESS == kStaged && EPILOGUE == kNoEpilogue && sizeof(S) == sizeof(T) ? 2 : 1;

template <class C>
struct RowStatistics {
  C mean, rstd;
};

template <class C, class Index>
FN_DEVICE RowStatistics<C> row_statistics(const Backward& a, Index row) {
  const C* const stats = static_cast<const C*>(a.stats);
  return {a.rms ? C(0) : stats[row], stats[(a.rms ? 0 : a.n_rows) + row]};
}

// The normalized row and g; both are zero past the row's end, or, without `EVERYTHING`, g is, whose dnormed has zeros.
// `saved` gives what was saved.
template <class T, int V, bool ALIGNED, bool EVERYTHING = true, class Saved>
FN_DEVICE void xhat_and_g(const Backward& a, const Raw<T, V>& dnormed, const Saved& saved,
                          const RowStatistics<Compute<T>>& stats, int column, int width, int64_t sample,
                          Numbers<Compute<T>, V>& xhat, Numbers<Compute<T>, V>& g) {
  using C = Compute<T>;
  using N = Numbers<C, V>;
  N weight(1);
  if (a.weight.data) {
    weight = load_parameter<T, V, ALIGNED>(a.weight, column, a.n_columns, sample);
    if (a.zero_centered) weight = weight + N(1);
  }
  g = dnormed.numbers() * weight;
  const bool from_normed = EVERYTHING && a.saved_is_normed;
  xhat = saved().numbers(from_normed);
  if (from_normed) {
    if (a.bias.data) xhat = xhat - load_parameter<T, V, ALIGNED>(a.bias, column, a.n_columns, sample);
    if (a.weight.data) xhat = xhat / weight;
  } else {
    xhat = (xhat - N(stats.mean)) * N(stats.rstd);
  }
  if constexpr (EVERYTHING) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool inside = column + (ALIGNED ? 0 : i) < width;
      xhat[i] = inside ? xhat[i] : C(0);
      g[i] = inside ? g[i] : C(0);
    }
  }
}

// The row means of g xhat and g, for rows too wide to hold. Grid (rows), block (threads).
template <class T, class S, bool OF_SAMPLES, bool ALIGNED>
FN_KERNEL(kSumsThreads, 2)
add_layer_norm_bwd_sums_kernel(FN_ARGUMENT Backward a) {
  using C = Compute<T>;
  constexpr int V = 16 / sizeof(T);
  const int n = a.n_columns;
  const int64_t row = blockIdx.x, sample = OF_SAMPLES ? row / a.rows_per_sample : 0;
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
    xhat_and_g<T, V, ALIGNED>(a, dnormed, [&]() -> const auto& { return saved; }, stats, column, n, sample, xhat, g);
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

// The vectors of a row that a thread has, from where they lie, whatever the strides of rows.
template <class T, class S, int V, bool ALIGNED>
class Direct {
 public:
  FN_DEVICE Direct(const Backward& a, int column, int64_t, int) : a_(a), column_(column) {}

  FN_DEVICE void next(int64_t row, int width) {
    dnormed_ = Raw<T, V>::template load<ALIGNED>(width ? row_at(a_.dnormed, row) : nullptr, column_, width);
    saved_.template load<ALIGNED>(a_.saved_is_normed, width ? row_at(a_.saved, row) : nullptr, column_, width);
    if (a_.dresidual_out.data)
      dresidual_out_ = Raw<S, V>::template load<ALIGNED>(width ? row_at(a_.dresidual_out, row) : nullptr, column_, width);
  }
  FN_DEVICE const Raw<T, V>& dnormed() const { return dnormed_; }
  FN_DEVICE const Either<T, S, V>& saved() const { return saved_; }
  FN_DEVICE const Raw<S, V>& dresidual_out() const { return dresidual_out_; }
  FN_DEVICE void done() {}
  FN_DEVICE void end() {}

 private:
  const Backward& a_;
  const int column_;
  Raw<T, V> dnormed_;
  Either<T, S, V> saved_;
  Raw<S, V> dresidual_out_;
};

// Rows on their way through shared memory: a thread's own vectors of the rows that it visits next. It alone writes and
// reads them, so no barrier stands between.
template <class T, class S, int V>
class Stages {
  static constexpr int kWide = sizeof(S) / sizeof(T);  // words of a vector of the residual

 public:
  // With two, 1024 threads have 48 KB on their way or more; at 33 bytes a nanosecond, a multiprocessor's share of 4.3 TB/s,
  // 20 KB of reads hide most of a microsecond.
  static constexpr int kStages = 2;
  static constexpr int kWords = 1 + 2 * kWide;
  static constexpr int kBytes = kStages * kWords * 16;  // of a thread

  FN_DEVICE Stages(const Backward& a, int column, int64_t row, int shared_offset)
      : a_(a), shared_(shared_offset), slot_(thread()), row_(uint32_t(row)), column_(column) {
    for (int stage = 0; stage < kStages; ++stage) fetch();
  }

  FN_DEVICE void next(int64_t, int) { wait_copies<kStages - 1>(); }

  // Of the row fetched longest ago, each when it is needed: registers are short.
  FN_DEVICE Raw<T, V> dnormed() const { return word<Raw<T, V>>(0); }
  FN_DEVICE Either<T, S, V> saved() const {
    compiler_fence();
    return {word<Raw<S, V>>(1)};
  }
  FN_DEVICE Raw<S, V> dresidual_out() const { return word<Raw<S, V>>(1 + kWide); }

  // Another row takes its place.
  FN_DEVICE void done() { fetch(); }

  // Nothing is on its way any more: the shared memory may serve another end.
  FN_DEVICE void end() { wait_copies<0>(); }

 private:
  FN_DEVICE static int thread() { return int(threadIdx.y * blockDim.x + threadIdx.x); }
  FN_DEVICE static int stride() { return int(blockDim.x * blockDim.y); }

  template <class Vector>
  FN_DEVICE Vector word(int first) const {
    Vector vector;
#pragma unroll
    for (int w = 0; w < Vector::kBytes / 16; ++w) vector.set(w, shared_.get(slot_ + (first + w) * stride()));
    return vector;
  }

  // In 32 bits, which take half the registers: the caller has seen that they suffice.
  template <class E>
  FN_DEVICE const char* at(const Rows& rows) const {
    return rows.data + uint64_t(row_) * uint32_t(rows.stride) + uint32_t(column_) * uint32_t(sizeof(E));
  }

  // Zeros where there is no such row, or the row has no such columns.
  FN_DEVICE void fetch() {
    const bool inside = column_ < a_.n_columns && row_ < uint32_t(a_.n_rows);
    const char *const dnormed = at<T>(a_.dnormed), *const saved = at<S>(a_.saved);
    shared_.copy(slot_, dnormed, inside);
#pragma unroll
    for (int w = 0; w < kWide; ++w) shared_.copy(slot_ + (1 + w) * stride(), saved + 16 * w, inside);
    if (a_.dresidual_out.data) {
      const char* const dresidual_out = at<S>(a_.dresidual_out);
#pragma unroll
      for (int w = 0; w < kWide; ++w) shared_.copy(slot_ + (1 + kWide + w) * stride(), dresidual_out + 16 * w, inside);
    }
    commit_copies();
    row_ += gridDim.y * blockDim.y;
    slot_ = 2 * thread() + kWords * stride() - slot_;
  }

  const Backward& a_;
  const Shared<uint4> shared_;
  int slot_;
  uint32_t row_;
  const int column_;
};

// Grid (slabs, or ranks of a cluster, of one sample after another where these have parameters; programs), block (threads
// of a row, rows).
template <class T, class S, Access ACCESS, Epilogue EPILOGUE>
FN_KERNEL(kBackwardThreads, (kBackwardBlocks<T, S, ACCESS, EPILOGUE>))
add_layer_norm_bwd_kernel(FN_ARGUMENT Backward a) {
  using C = Compute<T>;
  constexpr int V = 16 / sizeof(T);
  constexpr bool ALIGNED = ACCESS != kElements, EVERYTHING = ACCESS != kStaged;
  constexpr bool HAS_EPILOGUE = EPILOGUE != kNoEpilogue, OF_SAMPLES = EPILOGUE == kSampleEpilogue;
  using N = Numbers<C, V>;
  const Part part = part_of<EPILOGUE>(a);
  const int n = a.n_columns, column = int(part.block * blockDim.x + threadIdx.x) * V;
  RowGroup<C> group(int(blockDim.x));
  N dweight(0), dbias(0);
  [[maybe_unused]] N dx_bias(0), dlayer_scale(0);

  using Index = std::conditional_t<EVERYTHING, int64_t, uint32_t>;
  const Index step = Index(gridDim.y) * blockDim.y, first = OF_SAMPLES ? Index(part.sample * a.rows_per_sample) : 0;
  const Index n_rows = OF_SAMPLES ? first + Index(a.rows_per_sample) : Index(a.n_rows);  // with those before the sample's
  Index row = first + Index(blockIdx.y) * blockDim.y + threadIdx.y;
  std::conditional_t<EVERYTHING, Direct<T, S, V, ALIGNED>, Stages<T, S, V>> at_row(a, column, row,
                                                                                  RowGroup<C>::kSharedBytes);
  const auto statistics = [&](Index of) { return of < n_rows ? row_statistics<C>(a, of) : RowStatistics<C>{0, 0}; };
  RowStatistics<C> next = statistics(row);  // on their way a row ahead

#pragma unroll 1
  for (int round = 0; round < a.rounds; ++round, row += step) {  // all of them: threads meet at barriers
    const int width = row < n_rows ? n : 0;  // a row that is not there has no columns
    const RowStatistics<C> stats = next;
    next = statistics(row + step);
    // read for each row, because the round keys made of it would otherwise lie in registers all along
    [[maybe_unused]] const uint64_t seed = HAS_EPILOGUE && a.seed ? uint64_t(*a.seed) : 0;
    // here, because its division takes registers that are free only here
    [[maybe_unused]] const Path path = HAS_EPILOGUE && EVERYTHING ? path_of(a, seed, row) : Path::kNone;
    at_row.next(row, width);
    const Raw<T, V> dnormed = at_row.dnormed();
    N xhat, g;
    C means[2] = {0, 0};
    xhat_and_g<T, V, ALIGNED, EVERYTHING>(a, dnormed, [&] { return at_row.saved(); }, stats, column, width, part.sample,
                                          xhat, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dweight[i] += C(dnormed.get(i)) * xhat[i];
      dbias[i] += C(dnormed.get(i));
      means[0] += g[i] * xhat[i];
      means[1] += g[i];
    }
    if (a.sums) {
      const C* const made = static_cast<const C*>(a.sums);
      means[0] = width ? made[row] : C(0);
      means[1] = width ? made[a.n_rows + row] : C(0);
    } else {
      group.sum(means);
      const C share = sizeof(C) == 8 ? C(1) / C(n) : C(a.share);
      means[0] *= share, means[1] *= share;
    }
    if (a.rms) means[1] = 0;
    N d = (g - xhat * N(means[0]) - N(means[1])) * N(stats.rstd);
    if (a.dresidual_out.data) d = d + at_row.dresidual_out().numbers();
    at_row.done();
    if (a.dresidual)
      Either<T, S, V>::template store<ALIGNED>(d, a.residual_is_narrow, a.dresidual, int64_t(row) * n, column, width);
    if constexpr (HAS_EPILOGUE) {
      const auto x = [&] {
        return Raw<T, V>::template load<ALIGNED>(width ? row_at(a.x, row) : nullptr, column, width).numbers();
      };
      const At<T, V, ALIGNED, EVERYTHING> at{a, seed, path, row, column, width, part.sample};
      d = branch_gradient(at, d, x, true, EVERYTHING && a.dlayer_scale >= 0, dx_bias, dlayer_scale);
    }
    if (a.dx) Raw<T, V>::of(d).template store<ALIGNED>(static_cast<T*>(a.dx) + int64_t(row) * n, column, width);
  }
  trigger_dependents();
  at_row.end();
  const auto write = [&](int plane, N& sums) {
    const int64_t samples = OF_SAMPLES ? gridDim.x / unsigned(a.blocks_per_sample) : 1;
    write_partials<ALIGNED>(a.partials, plane, column, n, RowGroup<C>::kSharedBytes, sums, part.sample, samples);
  };
  write(a.dweight, dweight);
  write(a.dbias, dbias);
  if constexpr (HAS_EPILOGUE) {
    write(a.dx_bias, dx_bias);
    if constexpr (EVERYTHING) write(a.dlayer_scale, dlayer_scale);
  }
}

}  // namespace fusednorm_cuda
