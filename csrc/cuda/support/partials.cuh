// Sums over rows: a row of partial sums a block, and the kernel that adds these. No atomics.
#pragma once

#include "reduce.cuh"
#include "values.cuh"

namespace fusednorm_cuda {

constexpr int kFinalizeColumns = 32, kFinalizeRows = 32;
constexpr int kFinalizeTogether = 8;  // loads of a thread on their way at once

// What write_partials takes of shared memory, in numbers.
inline int partial_columns(const Form& f, int vector) {
  const int parts = f.threads < kWarp ? f.threads * f.rows / kWarp : f.rows;
  return f.rows > 1 ? parts * f.threads * vector : 0;
}

// One block's sums over its rows of one parameter gradient, to row blockIdx.y of plane `plane`, which has gridDim.y rows
// for each of `samples`. Rows that share a warp are added by shuffles, then warps, or rows of several, through shared
// memory: `partial_columns` of it, `shared_offset` bytes in.
template <bool ALIGNED, class C, int V>
FN_DEVICE void write_partials(void* partials, int plane, int column, int n, int shared_offset, Numbers<C, V>& sums,
                              int64_t sample = 0, int64_t samples = 1) {
  if (plane < 0) return;
  const int threads = int(blockDim.x);
  C* const out = static_cast<C*>(partials) + ((plane * samples + sample) * gridDim.y + blockIdx.y) * n;
  if (blockDim.y == 1) return Raw<C, V>::of(sums).template store<ALIGNED>(out, column, n);
  for (int offset = threads; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] += shuffle_xor(sums[i], offset);
  }
  const int thread = int(threadIdx.y) * threads + int(threadIdx.x), all = threads * int(blockDim.y), columns = threads * V;
  const bool in_warp = threads < kWarp;
  const int part = in_warp ? thread / kWarp : int(threadIdx.y), parts = in_warp ? all / kWarp : int(blockDim.y);
  const Shared<C> shared(shared_offset);
  sync_threads();  // who reads the plane before is done
  if (!in_warp || thread % kWarp < threads) {
#pragma unroll
    for (int i = 0; i < V; ++i) shared.set(part * columns + int(threadIdx.x) * V + i, sums[i]);
  }
  sync_threads();
  for (int c = thread; c < columns && c < n; c += all) {
    C total = 0;
    for (int p = 0; p < parts; ++p) total += shared.get(p * columns + c);
    out[c] = total;
  }
}

template <class C, class Index>
FN_DEVICE void store_as(Dtype dtype, void* out, Index column, C value) {
  switch (dtype) {
    case kFloat64: static_cast<double*>(out)[column] = double(value); break;
    case kFloat32: static_cast<float*>(out)[column] = float(value); break;
    case kBFloat16: static_cast<BFloat16*>(out)[column].bits = uint16_t(pack(float(value), 0.0f, BFloat16{})); break;
    case kFloat16: static_cast<Float16*>(out)[column].bits = uint16_t(pack(float(value), 0.0f, Float16{})); break;
  }
}

// Adds `count` rows of partial sums at a column, always in the same order: by threads of `row` 0 to `rows` - 1, which
// stand one after another in the block. The first of them stores the sum. Few blocks with much to read: their loads are
// what takes the time, so many are on their way at once.
template <class C, class Store>
FN_DEVICE void add_rows(const Finalize& a, const C* partials, const int& count, int column, bool wanted, int row, int rows,
                        const Store& store) {
  C total = 0;
  wait_for_dependency();
  if (wanted && column < a.n_columns) {
#pragma unroll 1
    for (int first = row; first < count; first += kFinalizeTogether * rows) {
      C parts[kFinalizeTogether];
#pragma unroll
      for (int i = 0; i < kFinalizeTogether; ++i) {
        const int p = first + i * rows;
        parts[i] = p < count ? partials[int64_t(p) * a.n_columns + column] : C(0);
      }
#pragma unroll
      for (int i = 0; i < kFinalizeTogether; ++i) total += parts[i];
    }
  }
  const Shared<C> shared(0);
  shared.set(int(threadIdx.y) * kFinalizeColumns + int(threadIdx.x), total);
  sync_threads();
  if (row == 0 && wanted && column < a.n_columns) {
    total = 0;
    for (int r = 0; r < rows; ++r)
      total += shared.get((int(threadIdx.y) - row + r) * kFinalizeColumns + int(threadIdx.x));
    store(total);
  }
}

// Adds the programs' partial sums of each column. Grid (columns, sums), block (columns, rows).
template <class C>
FN_KERNEL(kFinalizeColumns* kFinalizeRows, 1)
sum_partials_kernel(FN_ARGUMENT Finalize a) {
  const int column = int(blockIdx.x) * kFinalizeColumns + int(threadIdx.x), plane = int(blockIdx.y), rows = int(blockDim.y);
  const C* const partials = static_cast<const C*>(a.partials) + int64_t(plane) * a.programs * a.n_columns;
  add_rows(a, partials, a.programs, column, true, int(threadIdx.y), rows,
           [&](C total) { store_as<C>(a.dtype[plane], a.gradient[plane], column, total); });
}

// The same where some sums are one vector for each sample. Grid (columns x groups of samples, sums), block (columns,
// rows).
template <class C>
FN_KERNEL(kFinalizeColumns* kFinalizeRows, 1)
sum_sample_partials_kernel(FN_ARGUMENT SampleFinalize a) {
  const int across = (a.n_columns + kFinalizeColumns - 1) / kFinalizeColumns, group = int(blockIdx.x) / across;
  const int column = (int(blockIdx.x) - group * across) * kFinalizeColumns + int(threadIdx.x), plane = int(blockIdx.y);
  const bool each = a.each >> plane & 1;
  const int rows = each ? a.lanes : int(blockDim.y);
  const int row = int(threadIdx.y) & (rows - 1), sample = group * (int(blockDim.y) / rows) + int(threadIdx.y) / rows;
  const int count = each ? a.programs : a.programs * a.samples;
  const int64_t first = (int64_t(plane) * a.samples + sample) * a.programs;
  const C* const partials = static_cast<const C*>(a.partials) + first * a.n_columns;
  add_rows(a, partials, count, column, sample < (each ? a.samples : 1), row, rows, [&](C total) {
    store_as<C>(a.dtype[plane], a.gradient[plane], sample * int64_t(a.n_columns) + column, total);
  });
}

}  // namespace fusednorm_cuda
