// bias_act_dropout, a tile of a row at a time, and its gradients, four rows of a tile at a time; dropout_mask.
#pragma once

#include "activation_values.h"
#include "../support/philox.h"
#include "../support/rows.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// The rows of a block within a tile, from its first column on.
template <class C, class S>
struct TileRows {
  const S *x[kRowBlock], *dy[kRowBlock];
  S* out[kRowBlock];
  const S *next_x[kRowBlock], *next_dy[kRowBlock];  // of the next block, to be fetched meanwhile; or null
  const Int<C>* masks[kRowBlock];
};

// What is dropped is taken out before anything is computed of it: every activation makes 0 of 0.
template <class C, class S, int ACTIVATION>
FN_INLINE void activate_rows(const TileRows<C, S>& t, int64_t n, const C* bias, C scale) {
  over_columns<C>(n, [&](auto extent, int64_t j) __attribute__((always_inline)) {
    Vec<C> u = extent.template load<C>(t.x[0] + j);
    if (bias) u = u + extent.template load<C>(bias + j);
    if (t.masks[0]) u = u.kept(Vec<Int<C>>::load(t.masks[0] + j));
    u = activated<ACTIVATION>(u);
    if (t.masks[0]) u = u * Vec<C>(scale);
    extent.store(Stored<C, S>::of(u), t.out[0] + j);
  });
}

// A block's gradients are summed by themselves first: the chains of additions are a quarter as long, and so is their error.
template <class C, class S, int ACTIVATION>
FN_INLINE void pull_back_rows(const TileRows<C, S>& t, int rows, int64_t n, const C* bias, C scale, C* dbias) {
  over_columns<C>(n, [&](auto extent, int64_t j) __attribute__((always_inline)) {
    Vec<C> b, total(C(0));
    if (bias) b = extent.template load<C>(bias + j);
    for (int r = 0; r < rows; ++r) {
      if (t.next_x[r]) __builtin_prefetch(t.next_x[r] + j), __builtin_prefetch(t.next_dy[r] + j);
      Vec<C> u = extent.template load<C>(t.x[r] + j), d = extent.template load<C>(t.dy[r] + j);
      if (bias) u = u + b;
      if (t.masks[r]) {
        const auto kept = Vec<Int<C>>::load(t.masks[r] + j);
        u = u.kept(kept);
        d = (d * Vec<C>(scale)).kept(kept);
      }
      d = pulled_back<ACTIVATION>(u, d);
      if (t.out[r]) extent.store(Stored<C, S>::of(d), t.out[r] + j);
      total = total + d;
    }
    if (dbias) extent.store(Stored<C, C>::of(extent.template load<C>(dbias + j) + total), dbias + j);
  });
}

template <class C>
FN_INLINE void stage_tile(const Operand& o, int64_t row, int64_t column, int64_t n, C* out) {
  with_dtype(o.dtype, [&](auto s) {
    typedef decltype(s) S;
    const int64_t stride = o.unit ? 1 : o.cols[0].stride;
    run_in<C, S>((const S*)o.data + row_offset(o, row) + column * stride, stride, n, out);
  });
}

// Where row `row` of a block is read and written: in place, or staged in `memory`, where the output takes x's place.
template <class C, class S>
FN_INLINE void describe_tile(const ActivationCall& a, TileRows<C, S>& t, int r, int64_t row, int64_t column, int64_t n,
                             C* memory) {
  const bool direct = sizeof(S) != sizeof(C) || a.direct;
  if (direct) {
    t.x[r] = (const S*)a.x.data + row_offset(a.x, row) + column;
    t.dy[r] = a.dy.data ? (const S*)a.dy.data + row_offset(a.dy, row) + column : nullptr;
    t.out[r] = a.out ? (S*)a.out + row * a.n_columns + column : nullptr;
  } else {
    stage_tile(a.x, row, column, n, memory);
    t.x[r] = t.out[r] = (S*)memory;
    memory += padded(kTile);
    if (a.dy.data) stage_tile(a.dy, row, column, n, memory);
    t.dy[r] = (const S*)memory;
    if (a.dy.data) memory += padded(kTile);
  }
  t.masks[r] = a.element.on ? (const Int<C>*)memory : nullptr;
  if (a.element.on) mask_columns(a.seed, uint64_t(row), a.element.threshold, column, n, (Int<C>*)memory);
}

// A row of a block: x, dy, masks.
FN_INLINE int64_t tile_memory(const ActivationCall& a) {
  return ((a.direct ? 0 : a.dy.data ? 2 : 1) + (a.element.on ? 1 : 0)) * padded(kTile);
}

FN_INLINE int64_t tile_columns(const Grid& g, int64_t column) {
  return g.n_columns - column < kTile ? g.n_columns - column : kTile;
}

template <class C, class S, int ACTIVATION>
void forward_tiles(const ActivationCall& a, C* memory, int64_t first_tile, int64_t end_tile) {
  int64_t row = first_tile / a.row_tiles, column = first_tile % a.row_tiles * kTile;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t n = tile_columns(a, column);
    TileRows<C, S> t;
    describe_tile(a, t, 0, row, column, n, memory);
    activate_rows<C, S, ACTIVATION>(t, n, a.bias ? (const C*)a.bias + column : nullptr, C(a.element.scale));
    if (!a.direct) stage_out((const C*)t.out[0], n, a.x.dtype, a.out, row * a.n_columns + column);
    column += kTile;
    if (column >= a.n_columns) column = 0, ++row;
  }
}

// Whether a block's rows are fetched while the block before is computed: the processor's own guesses, one of eight rows,
// end with a short row. Rows that the caches hold already would only lose by it, long ones gain nothing.
FN_INLINE bool fetches(const ActivationCall& a, int64_t itemsize) {
  constexpr int64_t kCached = 1 << 20, kLongRow = 32 << 10;
  const int64_t row = times(a.n_columns, itemsize);
  return a.direct && row <= kLongRow && times(a.n_rows, row) > kCached;
}

template <class C, class S, int ACTIVATION>
void backward_tiles(const ActivationCall& a, C* memory, int64_t first_tile, int64_t end_tile) {
  const int64_t per_row = tile_memory(a);
  const bool fetching = fetches(a, sizeof(S));
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t chunk = tile / a.row_tiles, column = tile % a.row_tiles * kTile, n = tile_columns(a, column);
    const C* const bias = a.bias ? (const C*)a.bias + column : nullptr;
    C* const dbias = a.partials ? (C*)a.partials + chunk * a.partial_stride + column : nullptr;
    if (dbias) __builtin_memset(dbias, 0, n * sizeof(C));
    const int64_t begin = chunk * a.rows_per_chunk;
    const int64_t end = begin + a.rows_per_chunk < a.n_rows ? begin + a.rows_per_chunk : a.n_rows;
    for (int64_t row = begin; row < end; row += kRowBlock) {
      const int rows = end - row < kRowBlock ? int(end - row) : kRowBlock;
      TileRows<C, S> t;
      for (int r = 0; r < rows; ++r) {
        describe_tile(a, t, r, row + r, column, n, memory + r * per_row);
        const bool ahead = fetching && row + 2 * kRowBlock <= end;
        t.next_x[r] = ahead ? (const S*)a.x.data + row_offset(a.x, row + kRowBlock + r) + column : nullptr;
        t.next_dy[r] = ahead ? (const S*)a.dy.data + row_offset(a.dy, row + kRowBlock + r) + column : nullptr;
      }
      pull_back_rows<C, S, ACTIVATION>(t, rows, n, bias, C(a.element.scale), dbias);
      for (int r = 0; r < rows && a.out && !a.direct; ++r)
        stage_out((const C*)t.out[r], n, a.x.dtype, a.out, (row + r) * a.n_columns + column);
    }
  }
}

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// f(compute type, storage type of direct rows, activation)
template <class F>
FN_INLINE void with_call_types(const ActivationCall& a, F&& f) {
  with_row_types(a.wide, a.direct, a.x.dtype, [&](auto c, auto s) {
    switch (a.activation) {
#define FN_CASE(enumerator, ...) \
  case k##enumerator: return f(c, s, Constant<k##enumerator>{});
      FN_ACTIVATIONS(FN_CASE)
#undef FN_CASE
    }
  });
}

inline int64_t activation_workspace(const ActivationCall& a) {
  return (a.dy.data ? kRowBlock : 1) * tile_memory(a) * (a.wide ? 8 : 4);
}

inline void activation_forward(const ActivationCall& a, void* workspace, int64_t first_tile, int64_t end_tile) {
  with_call_types(a, [&](auto c, auto s, auto activation) {
    forward_tiles<decltype(c), decltype(s), decltype(activation)::value>(a, (decltype(c)*)workspace, first_tile, end_tile);
  });
}

inline void activation_backward(const ActivationCall& a, void* workspace, int64_t first_tile, int64_t end_tile) {
  with_call_types(a, [&](auto c, auto s, auto activation) {
    backward_tiles<decltype(c), decltype(s), decltype(activation)::value>(a, (decltype(c)*)workspace, first_tile, end_tile);
  });
}

inline void mask_tiles(const Grid& g, bool* out, int64_t first_tile, int64_t end_tile) {
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t row = tile / g.row_tiles, column = tile % g.row_tiles * kTile, n = tile_columns(g, column);
    bool kept[kTile + 32];  // mask_columns writes past the end, where another thread may be at work
    mask_columns(g.seed, uint64_t(row), g.element.threshold, column, n, kept);
    __builtin_memcpy(out + row * g.n_columns + column, kept, n);
  }
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
