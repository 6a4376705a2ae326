// Attention's backward for queries: delta, and their gradient, of a tile of queries that goes over the keys they see.
//
// dS = P (dP - delta + dlse), delta = rowsum(dout out). Weights come from the rounded lse, and all of a query's err by
// that; in float32 this is more than all else, and where terms nearly cancel so is what delta, of rounded results, errs.
// Then a first pass over the keys makes the inverse of the weights' sum, and delta, of these weights.
#pragma once

#include "attention_logits.cuh"
#include "attention_ring.cuh"

namespace fusednorm_cuda {

constexpr float kLog2OfE = 1.44269504088896340736f;

FN_DEVICE float read(const float* from, int64_t at, bool there, float otherwise = 0.0f) {
  return from && there ? from[at] : otherwise;
}

// Of a lane's two queries.
struct Statistics {
  float base[2], delta[2], dlse[2], inverse[2];
  bool there[2];

  template <class E>
  FN_DEVICE void load(const Attention& a, int64_t row, int query, int n_queries, const Lane& l, E) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = query + l.row + 8 * half;
      there[half] = at < n_queries;
      base[half] = base_of<E>(read(a.lse, row + at, there[half]), kLog2OfE);
      dlse[half] = read(a.dlse, row + at, there[half]);
    }
  }
  FN_DEVICE void load_sums(const Attention& a, int64_t row, int query, const Lane& l) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + query + l.row + 8 * half;
      delta[half] = read(a.delta, at, there[half]);
      inverse[half] = read(a.inverse, at, there[half], 1.0f);
    }
  }
  FN_DEVICE void store_sums(const Attention& a, int64_t row, int query, const Lane& l) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + query + l.row + 8 * half;
      if (l.pair || !there[half]) continue;
      a.delta[at] = delta[half];
      if (a.inverse) a.inverse[at] = inverse[half];
    }
  }
};

// Weights, not divided by their sum, and the gradients of the divided ones; zeros where not visible, and which are.
template <class E, int N, bool GENERAL, int DIM>
FN_DEVICE uint32_t differentiate(float (&p)[N / 8][4], float (&dp)[N / 8][4], float (&slope)[N / 8][4],
                                 const Statistics& of, const Attention& a, const Sequence& s, const Corner& at,
                                 Tile<E, DIM> queries, Tile<E, DIM> douts, Tile<E, DIM> keys, Tile<E, DIM> values,
                                 const Lane& l) {
  products<N>(p, queries, keys, l);
  const uint32_t visible = make_logits<E, N, GENERAL, false, true>(p, slope, a, s, at, l);
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) p[n][e] = weight_of<E>(p[n][e], of.base[e / 2], a);
  keep_only(visible, p);
  products<N>(dp, douts, values, l);
  uint32_t reached = visible;
  if constexpr (GENERAL)
    if (a.element.on) {
      reached &= kept_bits<N, false>(a, s.statistics(a, at.head), at.query, at.key, l);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[n][e] *= a.element.scale;
    }
  keep_only(reached, dp);
  return visible;
}

template <class E, int DIM, bool GENERAL, class S = Shape<sizeof(E), DIM, true>>
FN_KERNEL(S::kThreads, 1)
attention_bwd_dq_kernel(FN_ARGUMENT Attention a) {
  constexpr int N = S::kTile;
  using T = Tile<E, DIM>;
  enum { kSums, kPlain, kCareful };
  const Lane l(int(threadIdx.x));
  const Place place(a, a.n_heads, int(blockIdx.x));
  const Sequence& s = place.s;
  const int head = place.head, first = place.first_query(a, S::kRows), last = least(first + S::kRows, s.n_queries) - 1;
  if (first >= s.n_queries) return;
  const int key_head = head / (a.n_heads / a.n_key_heads), query = first + kWarpRows * l.warp;
  const GlobalRows k = s.keys(a, a.k, key_head, a.dim), v = s.keys(a, a.v, key_head, a.value_dim);
  const Tiles tiles = tiles_seen<N>(first, last, s.lower, s.upper, s.n_keys);
  const int64_t row = s.statistics(a, head);

  const T queries{0}, douts = queries.below(S::kRows);
  Ring<E, DIM, S> ring{douts.below(S::kRows).offset};
  queries.template fill<S::kRows, S::kThreads>(s.queries(a.q, head, a.dim), first);
  douts.template fill<S::kRows, S::kThreads>(s.queries(a.dout, head, a.value_dim), first);
  Statistics of;
  of.load(a, row, query, s.n_queries, l, E{});
#pragma unroll
  for (int half = 0; half < 2; ++half) of.delta[half] = 0, of.inverse[half] = 1;
  if (!a.inverse) {
    // the diagonal of a product: where one key is seen, sums that are made alike cancel dP
    static_assert(2 * S::kStages * N >= S::kRows);
    const T outs = ring.first(0);
    outs.template fill<S::kRows, S::kThreads>(s.queries(a.out, head, a.value_dim), first);
    commit_copies();
    wait_copies<0>();
    sync_threads();
    float d[2][4];
    const int own = kWarpRows * l.warp;
    products_of_warp<kWarpRows>(d, douts.below(own), outs.below(own), l);
    const int holder = 4 * l.row + l.row / 2;
    of.delta[0] = shuffle(l.row % 2 ? d[0][1] : d[0][0], holder);
    of.delta[1] = shuffle(l.row % 2 ? d[1][3] : d[1][2], holder);
    of.store_sums(a, row, query, l);
    if (!a.dq.data) return;
    sync_threads();  // the ring's tiles lie where the results were
  }

  float dq[DIM / 8][4], total[2] = {0, 0}, sum[2] = {0, 0};
  for (int pass = a.inverse ? kSums : kPlain;;) {
    clear(dq);
    ring.over(
        tiles.begin, tiles.end,
        [&](int tile, int ahead) {
          ring.first(ahead).template fill<N, S::kThreads>(k, tile * N);
          ring.second(ahead).template fill<N, S::kThreads>(v, tile * N);
        },
        [&](int tile) {
          if (!kOfWarpgroups<E> && !sees(query, s.n_queries, tile * N, N, s.lower, s.upper)) return;
          const Corner corner{s.batch, head, query, tile * N, tiles.whole(tile)};
          float p[N / 8][4], dp[N / 8][4], slope[N / 8][4];
          const uint32_t visible =
              differentiate<E, N, GENERAL>(p, dp, slope, of, a, s, corner, queries, douts, ring.first(0), ring.second(0), l);
          if (pass == kSums) {
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
              for (int e = 0; e < 4; ++e) total[e / 2] += p[n][e], sum[e / 2] += p[n][e] * dp[n][e];
            return;
          }
#pragma unroll
          for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              // dlse on its own: where one key is seen, delta cancels all else to the last bit
              p[n][e] *= (dp[n][e] - of.delta[e / 2]) + of.dlse[e / 2];
              if constexpr (GENERAL)
                if (a.softcap != 0) p[n][e] *= slope[n][e];
            }
          keep_only(visible, p);
          add_products<N>(dq, p, visible, sizeof(E) == 4 || pass == kCareful, ring.first(0), l);
        });
    if (pass == kSums) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[half] = row_sum(total[half]);
        of.inverse[half] = 1.0f / (total[half] == 0 ? 1.0f : total[half]);
        of.delta[half] = row_sum(sum[half]) * of.inverse[half];
      }
      of.store_sums(a, row, query, l);
      if (!a.dq.data) return;
      sync_threads();  // nobody reads the last pair any more
      pass = kPlain;
    } else if (sizeof(E) == 4 || pass == kCareful || !a.hides || !sync_threads_or(!all_finite(dq))) {
      break;
    } else {
      pass = kCareful;
    }
  }

  const Place again(a, a.n_heads, block_again());
  const Lane at(thread_again());
  const float factors[2] = {a.scale * of.inverse[0], a.scale * of.inverse[1]};
  sync_threads();
  queries.below(kWarpRows * at.warp).put(dq, at, factors);
  sync_threads();
  queries.template store<S::kRows, S::kThreads>(again.s.queries(a.dq, again.head, a.dim), again.first_query(a, S::kRows));
}

}  // namespace fusednorm_cuda
