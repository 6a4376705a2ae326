// Gradients of a key head by one thread, which computes each tile once: five products of tiles, not seven. Probabilities
// wait for their norms: those of a block of queries are kept until it has seen all keys. What a kernel of
// attention_backward.h adds, this one adds in the same order, so either gives the same bits.
#pragma once

#include "attention_backward.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// What a thread works in beside Memory: keys, values and sums of a head; tiles of a block of queries, two for each block of
// keys.
template <class C>
struct HeadMemory {
  C *rows, *value_rows, *sums, *value_sums, *tiles;
  int64_t n_rows, ld, value_ld;

  static FN_INLINE int64_t bytes(const AttentionCall& a) {
    const int64_t features = padded_dim(a.dim) + padded_dim(a.value_dim);
    return 2 * blocks_of(a.n_keys) * kBlockSize * (features + kStride) * sizeof(C);
  }
  FN_INLINE HeadMemory(const AttentionCall& a, const Memory<C>& m, void* memory)
      : n_rows(blocks_of(a.n_keys) * kBlockSize), ld(m.ld), value_ld(m.value_ld) {
    tiles = (C*)memory;
    rows = tiles + 2 * n_rows * kStride, sums = rows + n_rows * ld;
    value_rows = sums + n_rows * ld, value_sums = value_rows + n_rows * value_ld;
  }
  // With rows and tiles of the keys from `key` on.
  FN_INLINE Memory<C> at_keys(const Memory<C>& m, int64_t key) const {
    Memory<C> own = m;
    own.rows = rows + key * ld, own.value_rows = value_rows + key * value_ld;
    own.logits = tiles + 2 * key * kStride, own.slopes = own.logits + kBlockSize * kStride;
    return own;
  }
  FN_INLINE Memory<C> at_sums(const Memory<C>& m, int64_t key) const {
    Memory<C> own = m;
    own.sums = sums + key * ld, own.value_sums = value_sums + key * value_ld;
    return own;
  }
};

// precise_deltas of one block of keys, which leaves its products where they are.
template <class C>
void precise_deltas_of_few(const AttentionCall& a, const Memory<C>& m, const HeadMemory<C>& w, const Head& h, int64_t first,
                           int64_t n) {
  PreciseSums<C> sums;
  sums.stage(a, m, h, first, n);
  over_key_blocks(a, m, h, first, n, [&](const Tile& t, const C* hidden) {
    const Memory<C> own = w.at_keys(m, t.key);
    multiply_staged(a, own, t.n_keys, n);
    if (a.element.on) keep_tile<C, false>(a, h, t, m.keep);
    __builtin_memcpy(m.logits, own.logits, t.n_keys * kStride * sizeof(C));
    __builtin_memcpy(m.slopes, own.slopes, t.n_keys * kStride * sizeof(C));
    gradient_step<C, false>(a, m, t.n_keys, n, hidden, a.element.on ? m.keep : nullptr, true);
    sums.add(m, t);
  });
  sums.store(a, h, first, n);
}

// The gradient of a block of queries, and what it adds to the keys' sums.
template <class C>
void block_gradients(const AttentionCall& a, const Memory<C>& m, const HeadMemory<C>& w, const Head& h, int64_t first,
                     int64_t n) {
  const bool few = a.n_keys <= kBlockSize;
  const Int<C>* const keep = a.element.on ? m.keep : nullptr;
  stage_queries(a, m, h, first, n);
  rows_to_lanes(a, m, n);
  if (few) precise_deltas_of_few(a, m, w, h, first, n);
  if (!a.precise) deltas(a, m, h, first, n);
  stage_statistics(a, m, h, first, n, a.precise);
  C totals[kBlockSize] = {};
  __builtin_memset(m.sums, 0, n * m.ld * sizeof(C));
  over_key_blocks(a, m, h, first, n, [&](const Tile& t, const C* hidden) {
    const Memory<C> own = w.at_keys(m, t.key);
    if (!few) {
      multiply_staged(a, own, t.n_keys, n);
      if (keep) keep_tile<C, false>(a, h, t, m.keep);
    }
    gradient_step<C, false>(a, own, t.n_keys, n, hidden, keep, false);
    for (int64_t i = 0; i < n; ++i) totals[i] += m.totals[i];
    if (a.dq.data)
      add_product<C>(n, a.dim, t.n_keys, own.slopes, 1, kStride, hidden, nullptr, own.rows, m.ld, m.sums);
  });
  store_query_gradient(a, m, h, first, n, totals);
  scale_by_norms(a, m, h, first, n);
  const bool finite = all_finite(m.rows, n, a.dim, m.ld) && all_finite(m.value_rows, n, a.value_dim, m.value_ld);
  over_key_blocks(a, m, h, first, n, [&](const Tile& t, const C* hidden) {
    const Memory<C> own = w.at_keys(m, t.key), to = w.at_sums(m, t.key);
    const C* const unseen = finite ? nullptr : hidden;
    const Int<C>* const kept = finite ? nullptr : keep;
    if (kept) keep_tile<C, false>(a, h, t, m.keep);
    if (a.dv.data)
      add_product(t.n_keys, a.value_dim, n, own.logits, kStride, 1, unseen, kept, m.value_rows, m.value_ld, to.value_sums);
    if (a.dk.data)
      add_product<C>(t.n_keys, a.dim, n, own.slopes, kStride, 1, unseen, nullptr, m.rows, m.ld, to.sums);
  });
}

template <class C>
void head_gradients(const AttentionCall& a, const Memory<C>& m, const HeadMemory<C>& w, int64_t batch, int64_t key_head) {
  const int64_t group = a.n_heads / a.n_key_heads;
  const Head first_head = head_of(a, batch, key_head * group);
  for (int64_t key = 0; key < first_head.n_keys; key += kBlockSize)
    stage_keys(a, w.at_keys(m, key), first_head, key, least(kBlockSize, first_head.n_keys - key));
  __builtin_memset(w.sums, 0, first_head.n_keys * w.ld * sizeof(C));
  __builtin_memset(w.value_sums, 0, first_head.n_keys * w.value_ld * sizeof(C));
  for (int64_t g = 0; g < group; ++g) {
    const Head h = head_of(a, batch, key_head * group + g);
    for (int64_t first = 0; first < h.n_queries; first += kBlockSize)
      block_gradients(a, m, w, h, first, least(kBlockSize, h.n_queries - first));
  }
  for (int64_t key = 0; key < first_head.n_keys; key += kBlockSize)
    store_key_gradients(a, w.at_sums(m, key), first_head, key, least(kBlockSize, first_head.n_keys - key));
}

inline int64_t attention_head_workspace(const AttentionCall& a) {
  return attention_workspace(a) + (a.wide ? HeadMemory<double>::bytes(a) : HeadMemory<float>::bytes(a));
}

inline void attention_head_gradients(const AttentionCall& a, void* workspace, int64_t begin, int64_t end) {
  with_memory(a, workspace, [&](const auto& m) {
    const HeadMemory w(a, m, (char*)workspace + attention_workspace(a));
    for (int64_t item = begin; item < end; ++item)
      head_gradients(a, m, w, item / a.n_key_heads, item % a.n_key_heads);
  });
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
