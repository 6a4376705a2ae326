// What of a tile of logits is seen, and what is added to it. Tiles are [row][lane] with up to kBlockSize lanes a row: where
// LANES_ARE_KEYS rows are queries, otherwise rows are keys and lanes queries.
#pragma once

#include "attention_gemm.h"
#include "../support/philox.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// One head of one batch, or of one packed sequence.
struct Head {
  int64_t batch, head, key_head;
  int64_t n_queries, n_keys, first_query, first_key;
  int64_t shift;  // query i is on the diagonal with key i + shift
  int64_t row;    // of query 0 in lse and in the mask of dropout
};

FN_INLINE Head head_of(const AttentionCall& a, int64_t batch, int64_t head) {
  Head h = {batch, head, head / (a.n_heads / a.n_key_heads), a.n_queries, a.n_keys, 0, 0, 0, 0};
  h.row = (batch * a.n_heads + head) * a.n_queries;
  if (a.first_queries) {
    h.first_query = a.first_queries[batch], h.n_queries = a.first_queries[batch + 1] - h.first_query;
    h.first_key = a.first_keys[batch], h.n_keys = a.first_keys[batch + 1] - h.first_key;
    h.row = head * a.total_queries + h.first_query;
  }
  h.shift = a.lower_right ? h.n_keys - h.n_queries : 0;
  return h;
}

FN_INLINE int64_t offset_of(const Strided& t, int64_t batch, int64_t head, int64_t position) {
  return batch * t.batch + head * t.head + position * t.position;
}

struct Range {
  int64_t begin, end;
};

FN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys that causality and window let query i see; none of both ends decreases with i.
FN_INLINE Range keys_of(const AttentionCall& a, const Head& h, int64_t i) {
  const int64_t begin = a.window_left < 0 ? 0 : i + h.shift - a.window_left;
  const int64_t end = a.window_right < 0 ? h.n_keys : i + h.shift + a.window_right + 1;
  return {most(begin, 0), least(end, h.n_keys)};
}

// Queries that it lets see key j.
FN_INLINE Range queries_of(const AttentionCall& a, const Head& h, int64_t j) {
  const int64_t begin = a.window_right < 0 ? 0 : j - h.shift - a.window_right;
  const int64_t end = a.window_left < 0 ? h.n_queries : j - h.shift + a.window_left + 1;
  return {most(begin, 0), least(end, h.n_queries)};
}

struct Tile {
  int64_t query, key, n_queries, n_keys;  // the first ones, and how many
};

template <class C>
FN_INLINE void mask_run_in(const Mask& m, int64_t offset, int64_t stride, int64_t n, C* out) {
  if (m.dtype == kMaskBool) {
    const char* const p = m.data + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = p[i * stride] ? C(0) : -C(__builtin_inf());
  } else {
    with_dtype(Dtype(m.dtype), [&](auto s) { run_in<C>((const decltype(s)*)m.data + offset, stride, n, out); });
  }
}

// Values of a mask, -inf for what a bool one hides. `scratch` has a tile.
template <class C, bool LANES_ARE_KEYS>
void mask_values(const Mask& m, const Head& h, const Tile& t, C* out, C* scratch) {
  const int64_t rows = LANES_ARE_KEYS ? t.n_queries : t.n_keys, lanes = LANES_ARE_KEYS ? t.n_keys : t.n_queries;
  const int64_t row = LANES_ARE_KEYS ? m.query : m.key, lane = LANES_ARE_KEYS ? m.key : m.query;
  const int64_t first = h.batch * m.batch + h.head * m.head + t.query * m.query + t.key * m.key;
  if (lane != 0 && lane != 1 && row == 1) {
    for (int64_t l = 0; l < lanes; ++l) mask_run_in(m, first + l * lane, 1, rows, scratch + l * kStride);
    return transpose(scratch, kStride, lanes, rows, out);
  }
  for (int64_t r = 0; r < rows; ++r) {
    C* const values = out + r * kStride;
    if (row == 0 && r > 0) {
      __builtin_memcpy(values, out, lanes * sizeof(C));
    } else if (lane == 0) {
      C value[kBlock];
      mask_run_in(m, first + r * row, 1, 1, value);
      for (int64_t l = 0; l < lanes; ++l) values[l] = value[0];
    } else {
      mask_run_in(m, first + r * row, lane, lanes, values);
    }
  }
}

enum Seen { kNothing, kSomething, kEverything };

// What is added to a tile, with -inf for what is not seen, of lanes past the last too. Written for kSomething only.
template <class C, bool LANES_ARE_KEYS>
__attribute__((noinline)) Seen mask_tile(const AttentionCall& a, const Head& h, const Tile& t, C* out, C* scratch) {
  const C hidden = -C(__builtin_inf());
  const int64_t rows = LANES_ARE_KEYS ? t.n_queries : t.n_keys, lanes = LANES_ARE_KEYS ? t.n_keys : t.n_queries;
  const int64_t last = t.query + t.n_queries - 1;
  const bool cut = keys_of(a, h, last).begin > t.key || keys_of(a, h, t.query).end < t.key + t.n_keys;
  const char* const shown = a.key_mask.data ? a.key_mask.data + h.batch * a.key_mask.batch + t.key * a.key_mask.key : nullptr;
  int64_t n_shown = shown ? 0 : t.n_keys;
  for (int64_t j = 0; shown && j < t.n_keys; ++j) n_shown += shown[j * a.key_mask.key] != 0;
  if (n_shown == 0) return kNothing;
  if (!a.attn_mask.data && !cut && n_shown == t.n_keys) return kEverything;
  if (a.attn_mask.data)
    mask_values<C, LANES_ARE_KEYS>(a.attn_mask, h, t, out, scratch);
  else
    __builtin_memset(out, 0, rows * kStride * sizeof(C));
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) {
    C* const values = out + r * kStride;
    Range seen = {0, lanes};
    if (cut) {
      const Range whole = LANES_ARE_KEYS ? keys_of(a, h, t.query + r) : queries_of(a, h, t.key + r);
      const int64_t first = LANES_ARE_KEYS ? t.key : t.query;
      seen = {most(whole.begin - first, 0), least(whole.end - first, lanes)};
    }
    if (n_shown < t.n_keys && !LANES_ARE_KEYS && !shown[r * a.key_mask.key]) seen.end = 0;
    for (int64_t l = 0; l < seen.begin && l < lanes; ++l) values[l] = hidden;
    for (int64_t l = most(seen.end, 0); l < kBlockSize; ++l) values[l] = hidden;
    if (n_shown < t.n_keys && LANES_ARE_KEYS)
      for (int64_t l = 0; l < lanes; ++l)
        if (!shown[l * a.key_mask.key]) values[l] = hidden;
    for (int64_t l = 0; !any && l < lanes; ++l) any = values[l] != hidden;
  }
  return any ? kSomething : kNothing;
}

// Masks of dropout, all ones where kept, of four keys and a vector of queries at a time.
template <class I>
void keep_rows_of_keys(const AttentionCall& a, const Head& h, const Tile& t, I* out) {
  typedef Native<int64_t> Wide;
  Words lane;
  for (int i = 0; i < kQuads; ++i) lane[i] = i;
  for (int64_t l = 0; l < t.n_queries; l += kQuads) {
    const Words row = Words{} + uint64_t(h.row + t.query + l) + lane;
    for (int64_t j = 0; j < t.n_keys; j += 4) {
      Words c[4] = {Words{} + uint64_t((t.key + j) / 4), row, row >> 32, Words{} + uint64_t(kElementPhiloxOffset)};
      philox<Word>(c, a.seed);
      for (int w = 0; w < 4; ++w) {
        const Wide kept = (Wide)(c[w] & 0xffffffffu) >= (Wide{} + int64_t(a.element.threshold));
        I* const at = out + (j + w) * kStride + l;
        if constexpr (sizeof(I) == 8) {
          __builtin_memcpy(at, &kept, kBytes);
        } else {
          const auto narrow = __builtin_convertvector(kept, HalfNative<int32_t>);
          __builtin_memcpy(at, &narrow, kBytes / 2);
        }
      }
    }
  }
}

template <class C, bool LANES_ARE_KEYS>
__attribute__((noinline)) void keep_tile(const AttentionCall& a, const Head& h, const Tile& t, Int<C>* out) {
  if (!LANES_ARE_KEYS) return keep_rows_of_keys(a, h, t, out);
  for (int64_t r = 0; r < t.n_queries; ++r)
    mask_columns(a.seed, uint64_t(h.row + t.query + r), a.element.threshold, t.key, t.n_keys, out + r * kStride);
}

// --- a thread's memory ---

// All that a kernel works in. Lanes are [feature][lane], rows and sums [position][feature], tiles [row][lane].
template <class C>
struct Memory {
  C *lanes, *value_lanes, *rows, *value_rows, *sums, *value_sums;
  C *logits, *slopes, *hidden, *scratch, *total;
  Int<C>* keep;
  C *lse, *delta, *factors, *norms;
  C* totals;  // and behind them the excess of each
  int64_t ld, value_ld;

  static FN_INLINE int64_t bytes(const AttentionCall& a) {
    const int64_t features = padded_dim(a.dim) + padded_dim(a.value_dim);
    return (3 * features * kStride + 6 * kBlockSize * kStride + 6 * kBlockSize) * sizeof(C);
  }
  FN_INLINE Memory(const AttentionCall& a, void* workspace) : ld(padded_dim(a.dim)), value_ld(padded_dim(a.value_dim)) {
    C* next = (C*)workspace;
    const auto take = [&](int64_t n) {
      C* const taken = next;
      next += n;
      return taken;
    };
    lanes = take(kStride * ld), rows = take(kBlockSize * ld), sums = take(kBlockSize * ld);
    value_lanes = take(kStride * value_ld), value_rows = take(kBlockSize * value_ld);
    value_sums = take(kBlockSize * value_ld);
    C** const tiles[] = {&logits, &slopes, &hidden, &scratch, &total};
    for (C** tile : tiles) *tile = take(kBlockSize * kStride);
    keep = (Int<C>*)take(kBlockSize * kStride);
    lse = take(kBlockSize), delta = take(kBlockSize), factors = take(kBlockSize), norms = take(kBlockSize);
    totals = take(2 * kBlockSize);
  }
};

// c += what is seen of a tile, a[row * a_row + k * a_k], times rows of b.
template <class C>
FN_INLINE void add_product(int64_t rows, int64_t columns, int64_t n_k, const C* a, int64_t a_row, int64_t a_k,
                           const C* hidden, const Int<C>* keep, const C* b, int64_t ld_b, C* c, int64_t ld_c) {
  if ((hidden || keep) && !all_finite(b, n_k, columns, ld_b))
    product_of_seen(rows, columns, n_k, a, a_row, a_k, hidden, keep, b, ld_b, c, ld_c);
  else
    product<C, true>(rows, columns, n_k, a, a_row, a_k, b, ld_b, c, ld_c);
}

template <class C>
FN_INLINE void add_product(int64_t rows, int64_t columns, int64_t n_k, const C* a, int64_t a_row, int64_t a_k,
                           const C* hidden, const Int<C>* keep, const C* b, int64_t ld, C* c) {
  add_product(rows, columns, n_k, a, a_row, a_k, hidden, keep, b, ld, c, ld);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
