// Attention's backward for an additive mask: a block has a tile of the mask, and goes over all tiles of logits that it was
// added to, or over its share of them, in a fixed order.
#pragma once

#include "attention_backward.cuh"

namespace fusednorm_cuda {

FN_DEVICE void store_mask(const Attention& a, int64_t at, float value) {
  const bool partial = a.splits > 1;
  if (partial || a.dmask_dtype == kMaskFloat32)
    reinterpret_cast<float*>(a.dmask.data)[at] = value;
  else
    reinterpret_cast<uint16_t*>(a.dmask.data)[at] =
        uint16_t(a.dmask_dtype == kMaskBFloat16 ? pack(value, 0.0f, BFloat16{}) : pack(value, 0.0f, Float16{}));
}

template <class E, int DIM, class S = Shape<sizeof(E), DIM, true>>
FN_KERNEL(S::kThreads, 1)
attention_bwd_dmask_kernel(FN_ARGUMENT Attention a) {
  constexpr int N = S::kTile;
  using T = Tile<E, DIM>;
  const Lane l(int(threadIdx.x));
  const Sequence s(a, 0);
  const auto tiles_of = [](int n, int size) { return (n + size - 1) / size; };
  int rest = int(blockIdx.x);
  const auto take = [&](int n) {
    const int digit = rest % n;
    rest /= n;
    return digit;
  };
  const int split = take(a.splits), key = take(tiles_of(a.n_keys, N)) * N, own_first = take(tiles_of(a.mask_queries, S::kRows)) * S::kRows;
  const int own_head = take(a.mask_heads), own_batch = rest;
  const bool sums_queries = a.mask_queries < a.n_queries;  // is 1
  const int along_queries = sums_queries ? tiles_of(a.n_queries, S::kRows) : 1, along_heads = a.n_heads / a.mask_heads;
  const int64_t work = int64_t(along_queries) * along_heads * (a.n_batches / a.mask_batches);
  const T queries{0}, douts = queries.below(S::kRows), keys = douts.below(S::kRows), values = keys.below(N);
  const int own_row = kWarpRows * l.warp;

  float total[N / 8][4];
  clear(total);
#pragma unroll 1
  for (int64_t item = work * split / a.splits; item < work * (split + 1) / a.splits; ++item) {
    const int first = own_first + int(item % along_queries) * S::kRows, last = least(first + S::kRows, a.n_queries) - 1;
    const int head = own_head + int(item / along_queries % along_heads), query = first + own_row;
    const Tiles tiles = tiles_seen<N>(first, last, s.lower, s.upper, a.n_keys);
    if (key / N < tiles.begin || key / N >= tiles.end) continue;
    Sequence batch = s;
    batch.batch = own_batch + item / along_queries / along_heads;
    const int key_head = head / (a.n_heads / a.n_key_heads);
    const int64_t row = batch.statistics(a, head);
    queries.template fill<S::kRows, S::kThreads>(batch.queries(a.q, head, a.dim), first);
    douts.template fill<S::kRows, S::kThreads>(batch.queries(a.dout, head, a.value_dim), first);
    keys.template fill<N, S::kThreads>(batch.keys(a, a.k, key_head, a.dim), key);
    values.template fill<N, S::kThreads>(batch.keys(a, a.v, key_head, a.value_dim), key);
    commit_copies();
    Statistics of;
    of.load(a, row, query, a.n_queries, l, E{});
    of.load_sums(a, row, query, l);
    wait_copies<0>();
    if constexpr (kOfWarpgroups<E>) fence_for_warpgroups();
    sync_threads();
    const Corner corner{batch.batch, head, query, key, tiles.whole(key / N)};
    float p[N / 8][4], dp[N / 8][4], slope[N / 8][4];
    const uint32_t visible = differentiate<E, N, true>(p, dp, slope, of, a, batch, corner, queries, douts, keys, values, l);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        p[n][e] = p[n][e] * ((dp[n][e] - of.delta[e / 2]) + of.dlse[e / 2]) * of.inverse[e / 2];
    keep_only(visible, p);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) total[n][e] += p[n][e];
    sync_threads();  // nobody reads the tiles any more
  }

  const auto store = [&](int row, int column, float value) {
    if (row >= a.mask_queries || key + column >= a.n_keys) return;
    const int64_t plane = int64_t(own_batch) * a.mask_heads + own_head;
    const int64_t of_split = int64_t(split) * a.mask_batches * a.mask_heads * a.mask_queries * a.n_keys;
    store_mask(a, a.splits > 1 ? of_split + (plane * a.mask_queries + row) * a.n_keys + key + column
                               : own_batch * a.dmask.batch + own_head * a.dmask.head + row * a.dmask.position +
                                     (key + column) * a.dmask.feature,
               value);
  };
  if (!sums_queries) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store(own_first + own_row + l.row + 8 * (e / 2), 8 * n + 2 * l.pair + e % 2, total[n][e]);
    return;
  }
  const Shared<float> sums(0);
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = total[n][j] + total[n][2 + j];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += shuffle_xor(sum, offset);
      if (l.row == 0) sums.set(l.warp * N + 8 * n + 2 * l.pair + j, sum);
    }
  sync_threads();
  if (l.thread < N) {
    float sum = 0;
    for (int w = 0; w < S::kWarps; ++w) sum += sums.get(w * N + l.thread);
    store(0, l.thread, sum);
  }
}

}  // namespace fusednorm_cuda
