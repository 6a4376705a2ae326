// Where a block stands, and a tile of logits: scaled, capped and masked; and the weights they become.
#pragma once

#include "attention_tile.cuh"

#include "../support/philox.cuh"

namespace fusednorm_cuda {

FN_DEVICE int least(int a, int b) { return a < b ? a : b; }
FN_DEVICE int most(int a, int b) { return a > b ? a : b; }

// One batch, or one packed sequence. Query i sees key j if lower <= j - i <= upper.
struct Sequence {
  int64_t batch, first_query, first_key;
  int n_queries, n_keys, lower, upper;

  FN_DEVICE Sequence(const Attention& a, int index)
      : batch(index), first_query(0), first_key(0), n_queries(a.n_queries), n_keys(a.n_keys) {
    if (a.first_queries) {
      batch = 0, first_query = a.first_queries[index], first_key = a.first_keys[index];
      n_queries = int(a.first_queries[index + 1] - first_query), n_keys = int(a.first_keys[index + 1] - first_key);
    }
    const int offset = a.lower_right ? n_keys - n_queries : 0;
    lower = offset - a.window_left, upper = offset + a.window_right;
  }

  // Where statistics of a head's queries are, and their rows of the dropout mask.
  FN_DEVICE int64_t statistics(const Attention& a, int head) const {
    return (batch * a.n_heads + head) * a.total_queries + first_query;
  }
  FN_DEVICE GlobalRows queries(const Operand& o, int head, int columns) const {
    return rows_of(o, batch, head, first_query, n_queries, columns);
  }
  // Of keys or of values; those that a key mask hides are zeros.
  FN_DEVICE GlobalRows keys(const Attention& a, const Operand& o, int key_head, int columns) const {
    GlobalRows rows = rows_of(o, batch, key_head, first_key, n_keys, columns);
    if (a.key_mask.data) rows.shown = a.key_mask.data + batch * a.key_mask.batch, rows.shown_stride = a.key_mask.key;
    return rows;
  }
};

// What block `index` has: a tile of a head's queries, or of its keys.
struct Place {
  int tile, head;
  Sequence s;

  FN_DEVICE Place(const Attention& a, int n_heads, int index)
      : tile(index % a.n_tiles), head(index / a.n_tiles % n_heads), s(a, index / a.n_tiles / n_heads) {}
  // With causality the later queries see more: they begin.
  FN_DEVICE int first_query(const Attention& a, int rows) const { return (a.n_tiles - 1 - tile) * rows; }
};

// Tiles of SIZE from begin to end; those from full to full_end are seen by all of a block.
struct Tiles {
  int begin, end, full, full_end;
  FN_DEVICE bool whole(int tile) const { return full <= tile && tile < full_end; }
};

// Of the other side, for a block of rows first to last that each see those from row + lower to row + upper, of n.
template <int SIZE>
FN_DEVICE Tiles tiles_seen(int first, int last, int lower, int upper, int n) {
  const int low = most(0, first + lower), high = least(n, last + upper + 1);
  const int full_low = most(0, last + lower), full_high = least(n, first + upper + 1);
  const int begin = low / SIZE;
  return {begin, high > low ? (high + SIZE - 1) / SIZE : begin, (full_low + SIZE - 1) / SIZE, most(full_high, 0) / SIZE};
}

// Whether 16 rows from `row` on see any of a tile's columns, each those from row + lower to row + upper.
FN_DEVICE bool sees(int row, int n_rows, int column, int columns, int lower, int upper) {
  return row < n_rows && column + columns > row + lower && column <= row + kWarpRows - 1 + upper;
}

FN_DEVICE float mask_value(const Mask& mask, const char* at) {
  switch (mask.dtype) {
    case kMaskBool: return *at ? 0.0f : -INFINITY;
    case kMaskFloat32: return *reinterpret_cast<const float*>(at);
    case kMaskBFloat16: return widened(*reinterpret_cast<const uint16_t*>(at), BFloat16{});
    default: return widened(*reinterpret_cast<const uint16_t*>(at), Float16{});
  }
}
FN_DEVICE int size_of(MaskDtype dtype) { return dtype == kMaskBool ? 1 : dtype == kMaskFloat32 ? 4 : 2; }

// Within two roundings (Cephes' tanhf); that of a quotient of exponentials loses the small ones.
FN_DEVICE float tangent(float x) {
  const float square = x * x, size = fabsf(x);
  float series = ((2.06390887954e-2f - 5.70498872745e-3f * square) * square - 5.37397155531e-2f) * square;
  series = (series + 1.33314422036e-1f) * square - 3.33332819422e-1f;
  const float large = 1.0f - 2.0f / (expf(2.0f * size) + 1.0f);
  return size < 0.625f ? x + x * (square * series) : x < 0 ? -large : large;
}

// Bit 4 n + e: whether dropout keeps element e of columns 8 n on. One call of Philox serves four keys, and so four of a
// warp's lanes, or where they are queries by keys two: each makes a part of what all of these need.
template <int N, bool KEYS_FIRST>
FN_DEVICE uint32_t kept_bits(const Attention& a, int64_t mask_row, int query, int key, const Lane& l) {
  const uint64_t seed = uint64_t(*a.seed);
  const int part = KEYS_FIRST ? l.row % 4 : l.pair % 2;
  uint32_t mine = 0;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    const int own_query = KEYS_FIRST ? query + 8 * n + 2 * l.pair + part % 2 : query + l.row + 8 * part;
    const int own_key = KEYS_FIRST ? key + l.row / 4 * 4 + part / 2 * 8 : key + 8 * n + l.pair / 2 * 4;
    mine |= kept_columns<4>(seed, mask_row + own_query, own_key, a.element.threshold) << (4 * n);
  }
  uint32_t kept = 0;
#pragma unroll
  for (int other = 0; other < (KEYS_FIRST ? 4 : 2); ++other) {
    const uint32_t word = other ? shuffle_xor(mine, KEYS_FIRST ? 4 * other : other) : mine;
    const int made = part ^ other;  // the part of the lane that this comes from
    if constexpr (KEYS_FIRST) {
      kept |= (word >> (l.row % 4) & 0x11111111u) << made;
    } else {
      const uint32_t two = word >> (l.pair % 2 * 2);
      kept |= (two & 0x33333333u) << (2 * made);
    }
  }
  return kept;
}

// What is not known when the kernel is compiled about one warp's tile of logits.
struct Corner {
  int64_t batch;
  int head, query, key;  // of the first row and column of the tile
  bool whole;            // all of it is seen, but for masks
};

// From products to logits; -inf where not visible. Bit 4 n + e of the result: whether element e is. `slope` becomes the
// capped logits' derivative by the uncapped ones, where logits are capped. Rows are queries, or keys.
template <class E, int N, bool GENERAL, bool KEYS_FIRST, bool WANTS_SLOPE>
FN_DEVICE uint32_t make_logits(float (&x)[N / 8][4], float (&slope)[N / 8][4], const Attention& a, const Sequence& s,
                               const Corner& at, const Lane& l) {
  uint32_t visible = ~0u;
  const auto query_of = [&](int n, int e) { return at.query + (KEYS_FIRST ? 8 * n + 2 * l.pair + e % 2 : l.row + 8 * (e / 2)); };
  const auto key_of = [&](int n, int e) { return at.key + (KEYS_FIRST ? l.row + 8 * (e / 2) : 8 * n + 2 * l.pair + e % 2); };
  const auto each = [&](const auto& step) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) step(n, e);
  };
  const auto hide = [&](int n, int e, bool hidden) {
    if (hidden) visible &= ~(1u << (4 * n + e));
  };
  if (!at.whole)
    each([&](int n, int e) {
      const int query = query_of(n, e), key = key_of(n, e);
      hide(n, e, key - query < s.lower || key - query > s.upper || key >= s.n_keys || query >= s.n_queries);
    });
  if constexpr (GENERAL || sizeof(E) == 4) each([&](int n, int e) { x[n][e] *= a.scale; });
  if constexpr (GENERAL) {
    if (a.softcap != 0)
      each([&](int n, int e) {
        const float bent = tangent(x[n][e] / a.softcap);
        x[n][e] = a.softcap * bent;
        if constexpr (WANTS_SLOPE) slope[n][e] = 1.0f - bent * bent;
      });
    if (a.key_mask.data) {
      const char* const shown = a.key_mask.data + at.batch * a.key_mask.batch;
      each([&](int n, int e) {
        const int key = key_of(n, e);
        if (key < s.n_keys) hide(n, e, shown[key * a.key_mask.key] == 0);
      });
    }
    if (a.attn_mask.data) {
      const Mask& m = a.attn_mask;
      const int size = size_of(m.dtype);
      const char* const mask = m.data + (at.batch * m.batch + at.head * m.head) * size;
      each([&](int n, int e) {
        // of a whole tile, rows past the last one are not hidden
        if (!(visible >> (4 * n + e) & 1) || query_of(n, e) >= s.n_queries || key_of(n, e) >= s.n_keys) return;
        const float value = mask_value(m, mask + (query_of(n, e) * m.query + key_of(n, e) * m.key) * size);
        x[n][e] += value;
        hide(n, e, value == -INFINITY);
      });
    }
  }
  if (visible != ~0u)
    each([&](int n, int e) {
      if (!(visible >> (4 * n + e) & 1)) x[n][e] = -INFINITY;
    });
  return visible;
}

// exp(x - base) of logits as the kernel keeps them. `base` is base itself for float32, whose rounded product with log2(e)
// would err by more than all else; for 16 bits that product, an exponent of 2. Fused, the difference of two that are equal
// would be the rounding of one, which of large logits is large.
template <class E>
FN_DEVICE float weight_of(float x, float base, const Attention& a) {
  if constexpr (sizeof(E) == 4) return expf(x - base);
  return exp2_approximately(rounded_product(x, a.factor) - base);
}
template <class E>
FN_DEVICE float base_of(float x, float factor) {
  return sizeof(E) == 4 ? x : rounded_product(x, factor);
}

// Sets to zero what has no bit.
template <int N>
FN_DEVICE void keep_only(uint32_t bits, float (&numbers)[N][4]) {
  if (bits == ~0u) return;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!(bits >> (4 * n + e) & 1)) numbers[n][e] = 0;
}

template <int N>
FN_DEVICE bool all_finite(const float (&numbers)[N][4]) {
  bool finite = true;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) finite &= fabsf(numbers[n][e]) < INFINITY;
  return finite;
}

// Of the four lanes that have parts of one row.
FN_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace fusednorm_cuda
