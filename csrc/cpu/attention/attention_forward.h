// Attention of a block of queries, which goes over the keys once, tile by tile.
//
// Source: T. Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", arXiv:2205.14135;
// the softmax: M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
#pragma once

#include "attention_values.h"

namespace fusednorm_cpu {
namespace FN_ISA {

FN_INLINE int64_t blocks_of(int64_t n) { return (n + kBlockSize - 1) / kBlockSize; }

// Item `item` of those numbered along the blocks first: from both ends in turn, because causality makes the later ones
// longer, and a thread takes neighbours.
FN_INLINE int64_t block_of(int64_t item, int64_t blocks) {
  const int64_t n = item % blocks;
  return n % 2 ? blocks - 1 - n / 2 : n / 2;
}

// f(memory), of the compute type.
template <class F>
FN_INLINE void with_memory(const AttentionCall& a, void* workspace, F&& f) {
  if (a.wide) return f(Memory<double>(a, workspace));
  f(Memory<float>(a, workspace));
}

// work(memory, head, first query, how many) for blocks of queries.
template <class F>
FN_INLINE void over_query_blocks(const AttentionCall& a, void* workspace, int64_t begin, int64_t end, F&& work) {
  with_memory(a, workspace, [&](const auto& m) {
    const int64_t blocks = blocks_of(a.n_queries);
    for (int64_t item = begin; item < end; ++item) {
      const Head h = head_of(a, item / blocks / a.n_heads, item / blocks % a.n_heads);
      const int64_t first = block_of(item, blocks) * kBlockSize;
      if (first < h.n_queries) work(m, h, first, least(kBlockSize, h.n_queries - first));
    }
  });
}

// work(tile, what hides some of it or null) for the tiles of these queries that have something to see.
template <class C, bool LANES_ARE_KEYS = false, class F>
FN_INLINE void over_key_blocks(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n,
                               F&& work) {
  const int64_t end = keys_of(a, h, first + n - 1).end;
  for (int64_t key = keys_of(a, h, first).begin / kBlockSize * kBlockSize; key < end; key += kBlockSize) {
    const Tile t{first, key, n, least(kBlockSize, h.n_keys - key)};
    const Seen seen = mask_tile<C, LANES_ARE_KEYS>(a, h, t, m.hidden, m.scratch);
    if (seen != kNothing) work(t, seen == kSomething ? m.hidden : nullptr);
  }
}

// Queries of a block for which a vector of queries would be mostly empty: keys are the lanes then. The bits are the same. One
// query to 256 keys took 2.4 times as long.
constexpr int64_t kFewQueries = 8;

// Rows that are read where they lie, fetched while the tile before is computed, where no cache holds them all: the
// processor's own guesses end with a page. 4,096 keys of 48 heads took 1.2 times as long without.
constexpr int64_t kOfCaches = 32 << 20;

template <class C>
FN_INLINE void fetch_rows(const AttentionCall& a, const C* rows, int64_t ld, int64_t n, int64_t columns) {
  if (times(a.n_batches, a.n_key_heads, a.n_keys, a.dim + a.value_dim, sizeof(C)) < kOfCaches) return;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t j = 0; j < columns; j += 64 / int64_t(sizeof(C))) __builtin_prefetch(rows + r * ld + j);
}

// The logits of a tile, to m.logits: [key][query], or of few queries [query][key].
template <class C, bool FEW>
FN_INLINE void tile_logits(const AttentionCall& a, const Memory<C>& m, const Head& h, const Tile& t) {
  const int64_t keys = offset_of(a.k, h.batch, h.key_head, h.first_key + t.key);
  if constexpr (FEW) {
    int64_t ld = m.ld;
    const C* const rows = rows_of(a.k, a.dtype, keys, t.n_keys, a.dim, m.rows, ld);
    if (rows != m.rows) fetch_rows(a, rows + t.n_keys * ld, ld, least(kBlockSize, h.n_keys - t.key - t.n_keys), a.dim);
    transpose(rows, ld, t.n_keys, a.dim, m.lanes);
    product<C, false>(t.n_queries, t.n_keys, a.dim, m.sums, m.ld, 1, m.lanes, kStride, m.logits, kStride);
  } else {
    stage_rows(a.k, a.dtype, keys, t.n_keys, a.dim, m.rows, m.ld);
    product<C, false>(t.n_keys, t.n_queries, a.dim, m.rows, m.ld, 1, m.lanes, kStride, m.logits, kStride);
  }
}

template <class C, bool FEW>
void attend(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  const int64_t queries = offset_of(a.q, h.batch, h.head, h.first_query + first);
  stage_rows(a.q, a.dtype, queries, n, a.dim, FEW ? m.sums : m.rows, m.ld);
  if (!FEW) transpose(m.rows, m.ld, n, a.dim, m.lanes);
  for (int64_t i = 0; i < kBlockSize; ++i) m.lse[i] = -C(__builtin_inf()), m.delta[i] = 0;
  __builtin_memset(m.value_sums, 0, n * m.value_ld * sizeof(C));
  over_key_blocks<C, FEW>(a, m, h, first, n, [&](const Tile& t, const C* hidden) {
    Int<C>* const keep = a.element.on ? m.keep : nullptr;
    tile_logits<C, FEW>(a, m, h, t);
    if (keep) keep_tile<C, FEW>(a, h, t, keep);
    const auto step = FEW ? softmax_step_of_few<C> : softmax_step<C>;
    if (step(a, m, n, t.n_keys, hidden, keep))
      over_rows(m.value_sums, n, a.value_dim, m.value_ld, [&](Vec<C> sum, int64_t i) { return sum * Vec<C>(m.factors[i]); });
    const int64_t at = offset_of(a.v, h.batch, h.key_head, h.first_key + t.key);
    const int64_t left = least(kBlockSize, h.n_keys - t.key - t.n_keys);
    int64_t ld = m.value_ld;
    const C* values = m.value_rows;
    if constexpr (FEW) {
      values = rows_of(a.v, a.dtype, at, t.n_keys, a.value_dim, m.value_rows, ld);
      if (values != m.value_rows) fetch_rows(a, values + t.n_keys * ld, ld, left, a.value_dim);
    } else {
      stage_rows(a.v, a.dtype, at, t.n_keys, a.value_dim, m.value_rows, ld);
    }
    add_product(n, a.value_dim, t.n_keys, m.logits, FEW ? kStride : 1, FEW ? 1 : kStride, hidden, keep, values, ld,
                m.value_sums, m.value_ld);
  });
  C* const lse = (C*)a.lse + h.row + first;
  for (int64_t i = 0; i < n; ++i) {
    const C total = m.delta[i], log = sizeof(C) == 8 ? C(__builtin_log(total)) : C(__builtin_logf(total));
    lse[i] = total == C(0) ? -C(__builtin_inf()) : m.lse[i] + log;
    if (total == C(0)) m.delta[i] = 1;  // sees nothing: all sums are zeros
  }
  over_rows(m.value_sums, n, a.value_dim, m.value_ld, [&](Vec<C> sum, int64_t i) { return sum / Vec<C>(m.delta[i]); });
  unstage_rows(m.value_sums, m.value_ld, n, a.value_dim, a.dtype, a.out,
               offset_of(a.out, h.batch, h.head, h.first_query + first));
}

inline int64_t attention_workspace(const AttentionCall& a) {
  return a.wide ? Memory<double>::bytes(a) : Memory<float>::bytes(a);
}

inline void attention_forward(const AttentionCall& a, void* workspace, int64_t begin, int64_t end) {
  over_query_blocks(a, workspace, begin, end,
                    [&](const auto& m, const Head& h, int64_t first, int64_t n) {
                      typedef std::remove_reference_t<decltype(*m.lse)> C;
                      (n <= kFewQueries ? attend<C, true> : attend<C, false>)(a, m, h, first, n);
                    });
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
