// Attention's backward for keys and values: a block has a tile of keys and goes over the queries that see them, of every
// head of its group, so that nothing is added atomically.
//
// Keys stand first in its products: the transposed weights then stay in registers as the first operand of the next one.
#pragma once

#include "attention_backward.cuh"

namespace fusednorm_cuda {

template <bool FIRST, class A, class B>
FN_DEVICE auto& one_of(A& a, B& b) {
  if constexpr (FIRST)
    return a;
  else
    return b;
}

// Without S::kBoth one of dk and dv is absent.
template <class E, int DIM, bool GENERAL, class S = Shape<sizeof(E), DIM, true>>
FN_KERNEL(S::kThreads, 1)
attention_bwd_dkv_kernel(FN_ARGUMENT Attention a) {
  constexpr int N = S::kTile;
  using T = Tile<E, DIM>;
  const Lane l(int(threadIdx.x));
  const Place place(a, a.n_key_heads, int(blockIdx.x));
  const Sequence& s = place.s;
  const int key_head = place.head, first = place.tile * S::kRows, last = least(first + S::kRows, s.n_keys) - 1;
  if (first >= s.n_keys) return;
  const int group = a.n_heads / a.n_key_heads;
  Tiles tiles = tiles_seen<N>(first, last, -s.upper, -s.lower, s.n_queries);
  // rows past the last key are hidden: exp(0 - lse) may be infinite
  if (first + S::kRows > s.n_keys) tiles.full_end = tiles.full;
  const int per_head = tiles.end - tiles.begin;
  const bool wants_dk = a.dk.data, wants_dv = a.dv.data;

  const T keys{0}, values = keys.below(S::kRows);
  Ring<E, DIM, S> ring{values.below(S::kRows).offset};
  keys.template fill<S::kRows, S::kThreads>(s.keys(a, a.k, key_head, a.dim), first);
  values.template fill<S::kRows, S::kThreads>(s.keys(a, a.v, key_head, a.value_dim), first);

  float dk[DIM / 8][4], other[S::kBoth ? DIM / 8 : 1][4];
  auto& dv = one_of<S::kBoth>(other, dk);
  for (bool careful = sizeof(E) == 4;; careful = true) {
    clear(dk);
    clear(other);
    ring.over(
        0, group * per_head,
        [&](int item, int ahead) {
          const Place now(a, a.n_key_heads, block_again());
          const int head = now.head * group + item / per_head, query = (tiles.begin + item % per_head) * N;
          ring.first(ahead).template fill<N, S::kThreads>(now.s.queries(a.q, head, a.dim), query);
          ring.second(ahead).template fill<N, S::kThreads>(now.s.queries(a.dout, head, a.value_dim), query);
        },
        [&](int item) {
          const Place now(a, a.n_key_heads, block_again());
          const Sequence& s = now.s;
          const int head = now.head * group + item / per_head, tile = tiles.begin + item % per_head;
          const int key = now.tile * S::kRows + kWarpRows * l.warp;
          if (!kOfWarpgroups<E> && !sees(key, s.n_keys, tile * N, N, -s.upper, -s.lower)) return;
          const Corner corner{s.batch, head, tile * N, key, tiles.whole(tile)};
          const int64_t row = s.statistics(a, head);
          const auto statistic = [&](const float* of, int n, int e, float otherwise = 0.0f) {
            const int query = tile * N + 8 * n + 2 * l.pair + e % 2;
            return read(of, row + query, query < s.n_queries, otherwise);
          };
          float p[N / 8][4], slope[N / 8][4];
          products<N>(p, keys, ring.first(0), l);
          const uint32_t visible = make_logits<E, N, GENERAL, true, true>(p, slope, a, s, corner, l);
#pragma unroll
          for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float base = base_of<E>(statistic(a.lse, n, j), kLog2OfE), inverse = statistic(a.inverse, n, j, 1.0f);
              p[n][j] = weight_of<E>(p[n][j], base, a) * inverse;
              p[n][2 + j] = weight_of<E>(p[n][2 + j], base, a) * inverse;
            }
          keep_only(visible, p);
          uint32_t reached = visible;
          if constexpr (GENERAL)
            if (a.element.on) reached &= kept_bits<N, true>(a, row, corner.query, key, l);
          if (wants_dv) {
            float weights[N / 8][4];
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
              for (int e = 0; e < 4; ++e) weights[n][e] = p[n][e];
            if constexpr (GENERAL) keep_only(reached, weights);
            add_products<N>(dv, weights, reached, careful, ring.second(0), l);
          }
          if (!wants_dk) return;
          float dp[N / 8][4];
          products<N>(dp, values, ring.second(0), l);
          if constexpr (GENERAL)
            if (a.element.on) {
#pragma unroll
              for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) dp[n][e] *= a.element.scale;
              keep_only(reached, dp);
            }
#pragma unroll
          for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              p[n][e] *= (dp[n][e] - statistic(a.delta, n, e)) + statistic(a.dlse, n, e);
              if constexpr (GENERAL)
                if (a.softcap != 0) p[n][e] *= slope[n][e];
            }
          keep_only(visible, p);
          add_products<N>(dk, p, visible, careful, ring.first(0), l);
        });
    if (careful || !a.hides || !sync_threads_or(!(all_finite(dk) && all_finite(other)))) break;
  }

  const Place again(a, a.n_key_heads, block_again());
  const Lane at(thread_again());
  const float of_keys[2] = {a.scale, a.scale}, kept = a.element.on ? a.element.scale : 1.0f, of_values[2] = {kept, kept};
  const int own_row = kWarpRows * at.warp, first_row = again.tile * S::kRows;
  const auto result = [&](const Operand& o, int columns) {
    return rows_of(o, again.s.batch, again.head, again.s.first_key, again.s.n_keys, columns);
  };
  sync_threads();
  if (wants_dk) keys.below(own_row).put(dk, at, of_keys);
  if (wants_dv) values.below(own_row).put(dv, at, of_values);
  sync_threads();
  if (wants_dk) keys.template store<S::kRows, S::kThreads>(result(a.dk, a.dim), first_row);
  if (wants_dv) values.template store<S::kRows, S::kThreads>(result(a.dv, a.value_dim), first_row);
}

}  // namespace fusednorm_cuda
