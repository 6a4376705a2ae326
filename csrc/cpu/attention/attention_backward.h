// Gradients of attention. Each kernel computes the probabilities of its tiles anew from the log-sum-exp, and owns what it
// writes: nothing is added to from two threads, so results do not depend on their number. attention_heads.h computes each
// tile once, where there are heads enough, and adds the same numbers in the same order.
#pragma once

#include "attention_forward.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// delta = sum(dout * out), of the same chain of additions as the products of dout and values: with one key they cancel
// exactly. dout is staged.
template <class C>
void deltas(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  constexpr int W = kNativeLanes<C>, kVectors = kBlock / W;
  const int64_t ld = m.value_ld;
  stage_rows(a.out, a.dtype, offset_of(a.out, h.batch, h.head, h.first_query + first), n, a.value_dim, m.value_sums, ld);
  for (int64_t i = 0; i < n; i += kBlock) {  // a lane for each query
    const int64_t rows = least(kBlock, n - i);
    Native<C> totals[kVectors] = {};
    for (int64_t d = 0; d < a.value_dim; d += kBlock) {
      C gradients[kBlock * kBlock], values[kBlock * kBlock];
      const int64_t columns = least(kBlock, a.value_dim - d);
      transpose(m.value_rows + i * ld + d, ld, rows, columns, gradients, kBlock);
      transpose(m.value_sums + i * ld + d, ld, rows, columns, values, kBlock);
      for (int64_t c = 0; c < columns; ++c)
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = c * kBlock + v * W;
          totals[v] = multiply_add(native_load(gradients + at), native_load(values + at), totals[v]);
        }
    }
    __builtin_memcpy((C*)a.delta + h.row + first + i, totals, rows * sizeof(C));
  }
}

// Statistics of a block of queries; an lse of -inf, of a query that sees nothing, is one that makes all weights zero.
template <class C>
FN_INLINE void stage_statistics(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n,
                                bool with_norms = true) {
  const int64_t row = h.row + first;
  for (int64_t i = 0; i < kBlockSize; ++i) {
    const C lse = i < n ? ((const C*)a.lse)[row + i] : C(0);
    m.lse[i] = lse == -C(__builtin_inf()) ? -lse : lse;
    m.delta[i] = i < n ? ((const C*)a.delta)[row + i] : C(0);
    m.factors[i] = i < n && a.dlse ? ((const C*)a.dlse)[row + i] : C(0);
    m.norms[i] = i < n && with_norms ? ((const C*)a.norms)[row + i] : C(1);
  }
}

template <class C>
FN_INLINE void stage_dout(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  const int64_t offset = offset_of(a.dout, h.batch, h.head, h.first_query + first);
  stage_rows(a.dout, a.dtype, offset, n, a.value_dim, m.value_rows, m.value_ld);
}

template <class C>
FN_INLINE void stage_queries(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  stage_rows(a.q, a.dtype, offset_of(a.q, h.batch, h.head, h.first_query + first), n, a.dim, m.rows, m.ld);
  stage_dout(a, m, h, first, n);
}

template <class C>
FN_INLINE void stage_keys(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  const int64_t position = h.first_key + first;
  stage_rows(a.k, a.dtype, offset_of(a.k, h.batch, h.key_head, position), n, a.dim, m.rows, m.ld);
  stage_rows(a.v, a.dtype, offset_of(a.v, h.batch, h.key_head, position), n, a.value_dim, m.value_rows, m.value_ld);
}

template <class C>
FN_INLINE void rows_to_lanes(const AttentionCall& a, const Memory<C>& m, int64_t n) {
  transpose(m.rows, m.ld, n, a.dim, m.lanes);
  transpose(m.value_rows, m.value_ld, n, a.value_dim, m.value_lanes);
}

// Products of queries and keys, and of dout and values, of a tile of which rows and lanes are staged.
template <class C>
FN_INLINE void multiply_staged(const AttentionCall& a, const Memory<C>& m, int64_t rows, int64_t lanes) {
  product<C, false>(rows, lanes, a.dim, m.rows, m.ld, 1, m.lanes, kStride, m.logits, kStride);
  product<C, false>(rows, lanes, a.value_dim, m.value_rows, m.value_ld, 1, m.value_lanes, kStride, m.slopes, kStride);
}

// Dropped probabilities and gradients of the logits of a tile, of which rows and lanes are staged.
template <class C, bool LANES_ARE_KEYS>
FN_INLINE void differentiate(const AttentionCall& a, const Memory<C>& m, const Head& h, const Tile& t, const C* hidden,
                             const Int<C>* keep, bool of_mask) {
  const int64_t rows = LANES_ARE_KEYS ? t.n_queries : t.n_keys, lanes = LANES_ARE_KEYS ? t.n_keys : t.n_queries;
  multiply_staged(a, m, rows, lanes);
  if (keep) keep_tile<C, LANES_ARE_KEYS>(a, h, t, m.keep);
  gradient_step<C, LANES_ARE_KEYS>(a, m, rows, lanes, hidden, keep, of_mask);
}

// The same as the sum of probabilities times their gradients, without an out that was rounded, and norms: of few keys, or
// in a sum that is the gradient of a broadcast mask, the terms nearly cancel.
template <class C>
struct PreciseSums {
  C totals[kBlockSize] = {}, products[kBlockSize] = {};

  FN_INLINE void stage(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
    stage_statistics(a, m, h, first, n, false);
    for (int64_t i = 0; i < kBlockSize; ++i) m.delta[i] = m.factors[i] = 0;
  }
  FN_INLINE void add(const Memory<C>& m, const Tile& t) {
    for (int64_t i = 0; i < t.n_queries; ++i) {
      C product = 0;
      for (int64_t j = 0; j < t.n_keys; ++j) product += m.slopes[j * kStride + i];
      totals[i] += m.totals[i], products[i] += product;
    }
  }
  FN_INLINE void store(const AttentionCall& a, const Head& h, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const C total = totals[i] == C(0) ? C(1) : totals[i];  // of what sees nothing
      ((C*)a.norms)[h.row + first + i] = C(1) / total;
      ((C*)a.delta)[h.row + first + i] = products[i] / total;
    }
  }
};

template <class C>
void precise_deltas(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  stage_queries(a, m, h, first, n);
  rows_to_lanes(a, m, n);
  PreciseSums<C> sums;
  sums.stage(a, m, h, first, n);
  over_key_blocks(a, m, h, first, n, [&](const Tile& t, const C* hidden) {
    stage_keys(a, m, h, t.key, t.n_keys);
    differentiate<C, false>(a, m, h, t, hidden, a.element.on ? m.keep : nullptr, true);
    sums.add(m, t);
  });
  sums.store(a, h, first, n);
}

// m.sums, scaled, are the gradient of these queries. `totals` of their probabilities make norms, where these are not there
// yet: lse's rounding errs alike for all keys of a query.
template <class C>
FN_INLINE void store_query_gradient(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n,
                                    const C* totals) {
  C factors[kBlockSize];
  for (int64_t i = 0; i < n; ++i) {
    factors[i] = C(a.scale);
    if (a.precise) continue;
    const C norm = C(1) / (totals[i] == C(0) ? C(1) : totals[i]);  // none where a query sees nothing
    ((C*)a.norms)[h.row + first + i] = norm;
    factors[i] *= norm;
  }
  if (!a.dq.data) return;
  over_rows(m.sums, n, a.dim, m.ld, [&](Vec<C> sum, int64_t i) { return sum * Vec<C>(factors[i]); });
  unstage_rows(m.sums, m.ld, n, a.dim, a.dtype, a.dq, offset_of(a.dq, h.batch, h.head, h.first_query + first));
}

template <class C>
void query_block_gradient(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  stage_queries(a, m, h, first, n);
  rows_to_lanes(a, m, n);
  stage_statistics(a, m, h, first, n, a.precise);
  C totals[kBlockSize] = {};
  __builtin_memset(m.sums, 0, n * m.ld * sizeof(C));
  over_key_blocks(a, m, h, first, n, [&](const Tile& t, const C* hidden) {
    stage_keys(a, m, h, t.key, t.n_keys);
    differentiate<C, false>(a, m, h, t, hidden, a.element.on ? m.keep : nullptr, false);
    for (int64_t i = 0; i < n; ++i) totals[i] += m.totals[i];
    if (a.dq.data)
      add_product<C>(n, a.dim, t.n_keys, m.slopes, 1, kStride, hidden, nullptr, m.rows, m.ld, m.sums);
  });
  store_query_gradient(a, m, h, first, n, totals);
}

// Norms that a tile was made without, put on the staged queries and dout that it is multiplied by.
template <class C>
FN_INLINE void scale_by_norms(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  if (a.precise) return;
  const C* const norms = (const C*)a.norms + h.row + first;
  const auto step = [&](Vec<C> value, int64_t i) { return value * Vec<C>(norms[i]); };
  if (a.dk.data) over_rows(m.rows, n, a.dim, m.ld, step);
  if (a.dv.data) over_rows(m.value_rows, n, a.value_dim, m.value_ld, step);
}

// Sums of all queries of a group are the gradients of these keys.
template <class C>
FN_INLINE void store_key_gradients(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  const int64_t position = h.first_key + first;
  over_rows(m.sums, n, a.dim, m.ld, [&](Vec<C> sum, int64_t) { return sum * Vec<C>(C(a.scale)); });
  if (a.dk.data)
    unstage_rows(m.sums, m.ld, n, a.dim, a.dtype, a.dk, offset_of(a.dk, h.batch, h.key_head, position));
  if (a.dv.data)
    unstage_rows(m.value_sums, m.value_ld, n, a.value_dim, a.dtype, a.dv, offset_of(a.dv, h.batch, h.key_head, position));
}

// work(head, tile) for the tiles of these keys that causality and window do not hide, of all queries' heads of a group.
template <class F>
FN_INLINE void over_group_blocks(const AttentionCall& a, const Head& h, int64_t first, int64_t n, F&& work) {
  const int64_t group = a.n_heads / a.n_key_heads;
  for (int64_t g = 0; g < group; ++g) {
    const Head own = head_of(a, h.batch, h.key_head * group + g);
    const int64_t end = queries_of(a, own, first + n - 1).end;
    for (int64_t i = queries_of(a, own, first).begin / kBlockSize * kBlockSize; i < end; i += kBlockSize)
      work(own, Tile{i, first, least(kBlockSize, own.n_queries - i), n});
  }
}

template <class C>
void key_block_gradients(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  stage_keys(a, m, h, first, n);
  rows_to_lanes(a, m, n);
  __builtin_memset(m.sums, 0, n * m.ld * sizeof(C));
  __builtin_memset(m.value_sums, 0, n * m.value_ld * sizeof(C));
  over_group_blocks(a, h, first, n, [&](const Head& own, const Tile& t) {
    const Seen seen = mask_tile<C, true>(a, own, t, m.hidden, m.scratch);
    if (seen == kNothing) return;
    const C* const hidden = seen == kSomething ? m.hidden : nullptr;
    const Int<C>* const keep = a.element.on ? m.keep : nullptr;
    stage_queries(a, m, own, t.query, t.n_queries);
    stage_statistics(a, m, own, t.query, t.n_queries, a.precise);
    differentiate<C, true>(a, m, own, t, hidden, keep, false);
    scale_by_norms(a, m, own, t.query, t.n_queries);
    if (a.dv.data)
      add_product(n, a.value_dim, t.n_queries, m.logits, 1, kStride, hidden, keep, m.value_rows, m.value_ld, m.value_sums);
    if (a.dk.data)
      add_product<C>(n, a.dim, t.n_queries, m.slopes, 1, kStride, hidden, nullptr, m.rows, m.ld, m.sums);
  });
  store_key_gradients(a, m, h, first, n);
}

// A tile of the mask's gradient, summed over the batches, heads, queries and keys that the mask is broadcast over.
template <class C>
void mask_tile_gradient(const AttentionCall& a, const Memory<C>& m, int64_t item) {
  const int64_t query_tiles = blocks_of(a.mask_queries), key_tiles = blocks_of(a.mask_keys);
  const int64_t key_tile = item % key_tiles, query_tile = item / key_tiles % query_tiles;
  const int64_t head = item / key_tiles / query_tiles % a.mask_heads, batch = item / key_tiles / query_tiles / a.mask_heads;
  // of one element of the mask, all of what it is added to
  const auto range = [](int64_t index, int64_t own, int64_t all) { return own == 1 ? Range{0, all} : Range{index, index + 1}; };
  const auto blocks = [](int64_t tile, int64_t own, int64_t all) {
    return own == 1 ? Range{0, all} : Range{tile * kBlockSize, least((tile + 1) * kBlockSize, all)};
  };
  const Range batches = range(batch, a.mask_batches, a.n_batches), heads = range(head, a.mask_heads, a.n_heads);
  const Range queries = blocks(query_tile, a.mask_queries, a.n_queries), keys = blocks(key_tile, a.mask_keys, a.n_keys);
  __builtin_memset(m.total, 0, kBlockSize * kStride * sizeof(C));
  for (int64_t b = batches.begin; b < batches.end; ++b)
    for (int64_t hq = heads.begin; hq < heads.end; ++hq)
      for (int64_t key = keys.begin; key < keys.end; key += kBlockSize) {
        const Head h = head_of(a, b, hq);
        const int64_t n_keys = least(kBlockSize, keys.end - key);
        bool staged = false;
        for (int64_t query = queries.begin; query < queries.end; query += kBlockSize) {
          const Tile t = {query, key, least(kBlockSize, queries.end - query), n_keys};
          const Seen seen = mask_tile<C, true>(a, h, t, m.hidden, m.scratch);
          if (seen == kNothing) continue;
          if (!staged) {
            stage_keys(a, m, h, key, n_keys);
            rows_to_lanes(a, m, n_keys);
            staged = true;
          }
          stage_queries(a, m, h, query, t.n_queries);
          stage_statistics(a, m, h, query, t.n_queries);
          differentiate<C, true>(a, m, h, t, seen == kSomething ? m.hidden : nullptr, a.element.on ? m.keep : nullptr, true);
          for (int64_t i = 0; i < t.n_queries; ++i)
            for (int64_t j = 0; j < n_keys; ++j) m.total[i * kStride + j] += m.slopes[i * kStride + j];
        }
      }
  C* const total = m.total;
  if (a.mask_queries == 1)
    for (int64_t i = 1; i < kBlockSize; ++i)
      for (int64_t j = 0; j < kBlockSize; ++j) total[j] += total[i * kStride + j];
  if (a.mask_keys == 1)
    for (int64_t i = 0; i < kBlockSize; ++i)
      for (int64_t j = 1; j < kBlockSize; ++j) total[i * kStride] += total[i * kStride + j];
  const int64_t first_query = query_tile * kBlockSize, first_key = key_tile * kBlockSize;
  unstage_rows(total, kStride, least(kBlockSize, a.mask_queries - first_query),
               least(kBlockSize, a.mask_keys - first_key), Dtype(a.attn_mask.dtype), a.dmask,
               offset_of(a.dmask, batch, head, first_query) + first_key * a.dmask.feature);
}

inline void attention_delta(const AttentionCall& a, void* workspace, int64_t begin, int64_t end) {
  over_query_blocks(a, workspace, begin, end,
                    [&](const auto& m, const Head& h, int64_t first, int64_t n) {
                      stage_dout(a, m, h, first, n);
                      deltas(a, m, h, first, n);
                    });
}

inline void attention_precise_delta(const AttentionCall& a, void* workspace, int64_t begin, int64_t end) {
  over_query_blocks(a, workspace, begin, end,
                    [&](const auto& m, const Head& h, int64_t first, int64_t n) { precise_deltas(a, m, h, first, n); });
}

inline void attention_query_gradient(const AttentionCall& a, void* workspace, int64_t begin, int64_t end) {
  over_query_blocks(a, workspace, begin, end, [&](const auto& m, const Head& h, int64_t first, int64_t n) {
    query_block_gradient(a, m, h, first, n);
  });
}

inline void attention_key_gradients(const AttentionCall& a, void* workspace, int64_t begin, int64_t end) {
  with_memory(a, workspace, [&](const auto& m) {
    const int64_t blocks = blocks_of(a.n_keys), group = a.n_heads / a.n_key_heads;
    for (int64_t item = begin; item < end; ++item) {
      const Head h = head_of(a, item / blocks / a.n_key_heads, item / blocks % a.n_key_heads * group);
      const int64_t first = block_of(item, blocks) * kBlockSize;
      if (first < h.n_keys) key_block_gradients(a, m, h, first, least(kBlockSize, h.n_keys - first));
    }
  });
}

inline void attention_mask_gradient(const AttentionCall& a, void* workspace, int64_t begin, int64_t end) {
  with_memory(a, workspace, [&](const auto& m) {
    for (int64_t item = begin; item < end; ++item) mask_tile_gradient(a, m, item);
  });
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
