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
template <class C, class F>
FN_INLINE void over_key_blocks(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n,
                               F&& work) {
  const int64_t end = keys_of(a, h, first + n - 1).end;
  for (int64_t key = keys_of(a, h, first).begin / kBlockSize * kBlockSize; key < end; key += kBlockSize) {
    const Tile t{first, key, n, least(kBlockSize, h.n_keys - key)};
    const Seen seen = mask_tile<C, false>(a, h, t, m.hidden, m.scratch);
    if (seen != kNothing) work(t, seen == kSomething ? m.hidden : nullptr);
  }
}

template <class C>
void attend(const AttentionCall& a, const Memory<C>& m, const Head& h, int64_t first, int64_t n) {
  stage_rows(a.q, a.dtype, offset_of(a.q, h.batch, h.head, h.first_query + first), n, a.dim, m.rows, m.ld);
  transpose(m.rows, m.ld, n, a.dim, m.lanes);
  for (int64_t i = 0; i < kBlockSize; ++i) m.lse[i] = -C(__builtin_inf()), m.delta[i] = 0;
  __builtin_memset(m.value_sums, 0, n * m.value_ld * sizeof(C));
  over_key_blocks(a, m, h, first, n, [&](const Tile& t, const C* hidden) {
    Int<C>* const keep = a.element.on ? m.keep : nullptr;
    stage_rows(a.k, a.dtype, offset_of(a.k, h.batch, h.key_head, h.first_key + t.key), t.n_keys, a.dim, m.rows, m.ld);
    product<C, false>(t.n_keys, n, a.dim, m.rows, m.ld, 1, m.lanes, kStride, m.logits, kStride);
    if (keep) keep_tile<C, false>(a, h, t, keep);
    if (softmax_step(a, m, n, t.n_keys, hidden, keep))
      over_rows(m.value_sums, n, a.value_dim, m.value_ld, [&](Vec<C> sum, int64_t i) { return sum * Vec<C>(m.factors[i]); });
    stage_rows(a.v, a.dtype, offset_of(a.v, h.batch, h.key_head, h.first_key + t.key), t.n_keys, a.value_dim,
               m.value_rows, m.value_ld);
    add_product(n, a.value_dim, t.n_keys, m.logits, 1, kStride, hidden, keep, m.value_rows, m.value_ld, m.value_sums);
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
                    [&](const auto& m, const Head& h, int64_t first, int64_t n) { attend(a, m, h, first, n); });
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
