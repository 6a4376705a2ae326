// Attention's forward: a block has a tile of queries and goes over the keys they see, with an online softmax.
//
// Source: T. Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", arXiv:2205.14135;
// the softmax: M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
#pragma once

#include "attention_logits.cuh"
#include "attention_ring.cuh"

namespace fusednorm_cuda {

template <class E, int DIM, bool GENERAL, class S = Shape<sizeof(E), DIM, false>>
FN_KERNEL(S::kThreads, 1)
attention_fwd_kernel(FN_ARGUMENT Attention a) {
  constexpr int N = S::kTile;
  using T = Tile<E, DIM>;
  const Lane l(int(threadIdx.x));
  const Place place(a, a.n_heads, int(blockIdx.x));
  const Sequence& s = place.s;
  const int head = place.head, first = place.first_query(a, S::kRows), last = least(first + S::kRows, s.n_queries) - 1;
  if (first >= s.n_queries) return;
  const int key_head = head / (a.n_heads / a.n_key_heads), query = first + kWarpRows * l.warp;
  const GlobalRows q = s.queries(a.q, head, a.dim);
  const GlobalRows k = s.keys(a, a.k, key_head, a.dim), v = s.keys(a, a.v, key_head, a.value_dim);
  const Tiles tiles = tiles_seen<N>(first, last, s.lower, s.upper, s.n_keys);
  const int64_t row = s.statistics(a, head);

  const T block{0};
  Ring<E, DIM, S> ring{block.below(S::kRows).offset};
  block.template fill<S::kRows, S::kThreads>(q, first);

  float out[DIM / 8][4], largest[2], total[2];
  for (bool careful = sizeof(E) == 4;; careful = true) {
    clear(out);
#pragma unroll
    for (int half = 0; half < 2; ++half) largest[half] = -INFINITY, total[half] = 0;
    ring.over(
        tiles.begin, tiles.end,
        [&](int tile, int ahead) {
          ring.first(ahead).template fill<N, S::kThreads>(k, tile * N);
          ring.second(ahead).template fill<N, S::kThreads>(v, tile * N);
        },
        [&](int tile) {
          if (!kOfWarpgroups<E> && !sees(query, s.n_queries, tile * N, N, s.lower, s.upper)) return;
          const Corner corner{s.batch, head, query, tile * N, tiles.whole(tile)};
          float x[N / 8][4];
          products<N>(x, block, ring.first(0), l);
          uint32_t reached = make_logits<E, N, GENERAL, false, false>(x, x, a, s, corner, l);
          float now[2] = {largest[0], largest[1]}, shrink[2], base[2];
#pragma unroll
          for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) now[e / 2] = fmaxf(now[e / 2], x[n][e]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            now[half] = fmaxf(now[half], shuffle_xor(now[half], 1));
            now[half] = fmaxf(now[half], shuffle_xor(now[half], 2));
            base[half] = now[half] == -INFINITY ? 0.0f : base_of<E>(now[half], a.factor);  // -inf - -inf would be NaN
            shrink[half] = weight_of<E>(largest[half], base[half], a);
            total[half] *= shrink[half], largest[half] = now[half];
          }
#pragma unroll
          for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              x[n][e] = weight_of<E>(x[n][e], base[e / 2], a);
              total[e / 2] += x[n][e];
            }
          if constexpr (GENERAL)
            if (a.element.on) {
              const uint32_t kept = kept_bits<N, false>(a, row, query, tile * N, l);
              reached &= kept;
              keep_only(kept, x);
            }
#pragma unroll
          for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[n][e] *= shrink[e / 2];
          add_products<N>(out, x, reached, careful, ring.second(0), l);
        });
    // what is hidden or dropped was a factor of zero, and 0 * NaN is NaN
    if (careful || !a.hides || !sync_threads_or(!all_finite(out))) break;
  }

  const Place again(a, a.n_heads, block_again());
  const Lane own(thread_again());
  const int first_row = again.first_query(a, S::kRows), first_own = first_row + kWarpRows * own.warp;
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = row_sum(total[half]);
    const bool dead = total[half] == 0;
    const float divisor = dead ? 1.0f : total[half];
    factors[half] = (a.element.on ? a.element.scale : 1.0f) / divisor;
    const int at = first_own + own.row + 8 * half;
    if (own.pair == 0 && at < again.s.n_queries)
      a.lse[again.s.statistics(a, again.head) + at] = dead ? -INFINITY : largest[half] * a.natural + logf(divisor);
  }
  sync_threads();  // nobody reads the queries any more
  block.below(kWarpRows * own.warp).put(out, own, factors);
  sync_threads();
  block.template store<S::kRows, S::kThreads>(again.s.queries(a.out, again.head, a.value_dim), first_row);
}

}  // namespace fusednorm_cuda
