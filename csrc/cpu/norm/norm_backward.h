// The backward of every norm of the family, a block of rows at a time.
//
// With xhat = (z - mean) rstd, g = weight * dy and bars for row means,
// dz = rstd (g - bar(g) - xhat bar(g xhat)) + dresidual_out; RMSNorm lacks bar(g).
#pragma once

#include "norm_backward_narrow.h"
#include "../support/partials.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// The rows of a block, all read and written as S.
template <class C, class S>
struct Block {
  const S *dnormed[kRowBlock], *saved[kRowBlock], *dresidual_out[kRowBlock], *x[kRowBlock];
  S *dx[kRowBlock], *dresidual[kRowBlock];
  const S *next_dnormed[kRowBlock], *next_saved[kRowBlock];  // of the next block, to be fetched; or null
  const Int<C>* masks[kRowBlock];
  Path path[kRowBlock];
  C mean[kRowBlock], rstd[kRowBlock], product[kRowBlock], shift[kRowBlock];  // the last two: row means of g xhat and g
};

// What is there, as constants where it is common: conditions inside a loop took as much time as the arithmetic.
template <bool COMMON, bool RMS, bool EPILOGUE>
struct Present {
  static constexpr bool kCommon = COMMON, kRms = RMS, kEpilogue = EPILOGUE;
  const bool weight_, dweight_, dbias_, saved_is_normed_, dx_, dresidual_, nontemporal_;

  template <class C>
  Present(const Backward& a, const ParameterSums<C>& sums)
      : weight_(a.weight), dweight_(sums.dweight), dbias_(sums.dbias), saved_is_normed_(a.saved_is_normed),
        dx_(a.dx), dresidual_(a.dresidual), nontemporal_(a.nontemporal) {}
  FN_INLINE bool holds() const {
    const bool parameters = weight_ && dweight_ && (RMS ? !dbias_ : dbias_);
    return parameters && !saved_is_normed_ && dx_ && (EPILOGUE || !dresidual_) && !nontemporal_;
  }
  // step(row) for every row of a block, which are kRowBlock in the common case.
  template <class F>
  static FN_INLINE void over(int rows, F&& step) {
    if constexpr (COMMON)
      each<kRowBlock>(step);
    else
      for (int r = 0; r < rows; ++r) step(r);
  }
  FN_INLINE bool weight() const { return COMMON || weight_; }
  FN_INLINE bool dweight() const { return COMMON || dweight_; }
  FN_INLINE bool dbias() const { return COMMON ? !RMS : dbias_; }
  FN_INLINE bool saved_is_normed() const { return !COMMON && saved_is_normed_; }
  FN_INLINE bool dx() const { return COMMON || dx_; }
  FN_INLINE bool dresidual() const { return (!COMMON || EPILOGUE) && dresidual_; }
  FN_INLINE bool nontemporal() const { return !COMMON && nontemporal_; }
};

template <class C, class S, class E, class P>
FN_INLINE Vec<C> normalized(const Backward& a, E extent, const Block<C, S>& b, int r, int64_t j, const P& present) {
  const Vec<C> v = extent.template load<C>(b.saved[r] + j);
  if (!present.saved_is_normed())  // past the row's end the product may overflow
    return extent.only((P::kRms ? v : v - Vec<C>(b.mean[r])) * Vec<C>(b.rstd[r]));
  Vec<C> u = v;
  if (a.bias) u = u - extent.template load<C>((const C*)a.bias + j);
  if (present.weight()) u = u / extent.template load<C>((const C*)a.weight + j);
  return extent.only(u);  // 0 / 0 past the row's end
}

// What a block reads later, fetched while the processor would wait for none of it: its own guesses end with a row, and of
// four rows side by side it makes few. Not of rows so wide that a block of them would not stay in its cache meanwhile.
constexpr int64_t kMostFetched = 256 << 10, kLeastNext = 2 << 10, kMostNext = 64 << 10;

// Sums of g xhat and of g over a row, lane by lane.
template <class C, class S, class P>
FN_INLINE void row_sums(const Backward& a, const Block<C, S>& b, int r, const P& present, Vec<C>& product,
                        Vec<C>& shift) {
  Sums<C> products, shifts;
  products.clear(), shifts.clear();
  const bool stays = times(a.n_columns, sizeof(S)) <= kMostFetched;
  const S* const dresidual_out = stays ? b.dresidual_out[r] : nullptr;
  const S* const x = P::kEpilogue && stays ? b.x[r] : nullptr;
  sum_over_columns<C>(a.n_columns, [&](auto extent, int64_t j, int k) __attribute__((always_inline)) {
    if (dresidual_out) __builtin_prefetch(dresidual_out + j);
    if (x) __builtin_prefetch(x + j);
    Vec<C> g = extent.template load<C>(b.dnormed[r] + j);
    if (present.weight()) g = g * extent.template load<C>((const C*)a.weight + j);
    products.add(k, g * normalized(a, extent, b, r, j, present));
    if (!P::kRms) shifts.add(k, g);
  }, [&]() __attribute__((always_inline)) { products.fold(), shifts.fold(); });
  product = products.total(), shift = shifts.total();
}

// Gradients of a block's rows, and what they add to the sums over rows. A block is summed by itself first: the chains of
// additions are a quarter as long, and so is their error.
template <class C, class S, class P>
FN_INLINE void gradients(const Backward& a, const Block<C, S>& b, int rows, const ParameterSums<C>& sums, const P& present) {
  const bool has_dresidual_out = b.dresidual_out[0];
  const bool fetch = sizeof(S) == 2 && b.next_dnormed[0], dx = present.dx(), dresidual = present.dresidual();
  over_columns<C>(a.n_columns, [&](auto extent, int64_t j) __attribute__((always_inline)) {
    const auto load = [&](const C* p) __attribute__((always_inline)) { return extent.template load<C>(p + j); };
    const auto add = [&](const Vec<C>& v, C* p) __attribute__((always_inline)) {
      extent.store(Stored<C, C>::of(load(p) + v), p + j);
    };
    Vec<C> w, sw(C(0)), sb = sw, sx = sw, sl = sw;
    if (present.weight()) w = load((const C*)a.weight);
    // All rows are read before one is written: a row that ends 4 KB after the one before would wait for its stores.
    Vec<C> dys[kRowBlock], xhats[kRowBlock];
    P::over(rows, [&](auto r) __attribute__((always_inline)) {
      if (fetch) __builtin_prefetch(b.next_dnormed[r] + j, 0, 2), __builtin_prefetch(b.next_saved[r] + j, 0, 2);
      dys[r] = extent.template load<C>(b.dnormed[r] + j), xhats[r] = normalized(a, extent, b, r, j, present);
    });
    P::over(rows, [&](auto r) __attribute__((always_inline)) {
      const Vec<C> dy = dys[r], xhat = xhats[r];
      const Vec<C> g = present.weight() ? dy * w : dy;
      Vec<C> d = g - xhat * Vec<C>(b.product[r]);
      if (!P::kRms) d = d - Vec<C>(b.shift[r]);
      d = d * Vec<C>(b.rstd[r]);
      if (has_dresidual_out) d = d + extent.template load<C>(b.dresidual_out[r] + j);
      if (dresidual) extent.store(Stored<C, S>::of(d), b.dresidual[r] + j, present.nontemporal());
      if (present.dweight()) sw = sw + dy * xhat;
      if (present.dbias()) sb = sb + dy;
      if (P::kEpilogue) {
        const At<C, decltype(extent)> at{a, extent, b.masks[r], b.path[r], j};
        const auto x = [&]() __attribute__((always_inline)) { return extent.template load<C>(b.x[r] + j); };
        d = branch_gradient(at, d, x, sums.dx_bias, sums.dlayer_scale, sx, sl);
      }
      if (dx) extent.store(Stored<C, S>::of(d), b.dx[r] + j, present.nontemporal());
    });
    if (present.dweight()) add(sw, sums.dweight);
    if (present.dbias()) add(sb, sums.dbias);
    if (P::kEpilogue && sums.dx_bias) add(sx, sums.dx_bias);
    if (P::kEpilogue && sums.dlayer_scale) add(sl, sums.dlayer_scale);
  }, stores_run_ahead(dx ? b.dx[0] : b.dresidual[0], b.saved[0], b.dnormed[0]));
}

constexpr int kStagedRows = 6;  // dnormed, saved, dresidual_out, x, dx, dresidual

template <class C, class S>
FN_INLINE void describe_row(const Backward& a, Block<C, S>& b, int r, int64_t row, C* staged, Int<C>* masks) {
  const bool direct = sizeof(S) != sizeof(C) || a.direct;
  const int64_t n = a.n_columns, room = padded(n);
  const Operand* const operands[4] = {&a.dnormed, &a.saved, &a.dresidual_out, &a.x};
  const S* rows[4];
  for (int i = 0; i < 4; ++i) {
    const Operand& o = *operands[i];
    if (!o.data) {
      rows[i] = nullptr;
    } else if (direct) {
      rows[i] = row_of<S>(o, row);
    } else {
      stage_in(o, row, n, staged + i * room);
      rows[i] = (const S*)(staged + i * room);
    }
  }
  b.dnormed[r] = rows[0], b.saved[r] = rows[1], b.dresidual_out[r] = rows[2], b.x[r] = rows[3];
  b.dx[r] = !a.dx ? nullptr : direct ? (S*)a.dx + row * n : (S*)(staged + 4 * room);
  b.dresidual[r] = !a.dresidual ? nullptr : direct ? (S*)a.dresidual + row * n : (S*)(staged + 5 * room);
  const C* stats = (const C*)a.stats;
  b.mean[r] = a.rms ? C(0) : stats[row];
  b.rstd[r] = stats[a.rms ? row : a.n_rows + row];
  b.path[r] = a.epilogue ? path_of(a, row) : Path::kNone;
  b.masks[r] = masks;
  if (masks) row_masks(a, row, masks);
}

FN_INLINE int64_t staged_rows(const Backward& a) { return (a.direct ? 0 : kStagedRows) + (a.element.on ? 1 : 0); }

// Rows from `row` on, kRowBlock at most.
template <class C, class S, class P>
FN_INLINE void backward_block(const Backward& a, char* workspace, int64_t row, int rows, bool ahead,
                              const ParameterSums<C>& sums, const P& present) {
  Block<C, S> b;
  const int64_t n = a.n_columns, room = padded(n), per_row = staged_rows(a) * room;
  Vec<C> products[kRowBlock], shifts[kRowBlock];
  for (int r = 0; r < rows; ++r) {
    b.next_dnormed[r] = ahead ? row_of<S>(a.dnormed, row + kRowBlock + r) : nullptr;
    b.next_saved[r] = ahead ? row_of<S>(a.saved, row + kRowBlock + r) : nullptr;
    C* const staged = (C*)workspace + r * per_row;
    describe_row(a, b, r, row + r, staged, a.element.on ? (Int<C>*)(staged + per_row - room) : nullptr);
    row_sums(a, b, r, present, products[r], shifts[r]);
  }
  if constexpr (P::kCommon) {
    sums_of_lanes<C, kRowBlock>([&](int r) __attribute__((always_inline)) { return products[r]; }, b.product);
    sums_of_lanes<C, kRowBlock>([&](int r) __attribute__((always_inline)) { return shifts[r]; }, b.shift);
  } else {
    for (int r = 0; r < rows; ++r) b.product[r] = sum(products[r]), b.shift[r] = sum(shifts[r]);
  }
  for (int r = 0; r < rows; ++r) b.product[r] = b.product[r] / C(n), b.shift[r] = P::kRms ? C(0) : b.shift[r] / C(n);
  gradients(a, b, rows, sums, present);
  for (int r = 0; r < rows && !a.direct; ++r) {
    if (a.dx) stage_out((const C*)b.dx[r], n, a.dx_dtype, a.dx, (row + r) * n);
    if (a.dresidual) stage_out((const C*)b.dresidual[r], n, a.dresidual_dtype, a.dresidual, (row + r) * n);
  }
}

template <class C, class S, bool RMS, bool EPILOGUE>
void backward_chunks(const Backward& a, char* workspace, int64_t first_chunk, int64_t end_chunk) {
  const int64_t bytes = times(a.n_columns, sizeof(S));
  const bool fetches = sizeof(S) == 2 && bytes >= kLeastNext && bytes <= kMostNext;
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    C* const partials = (C*)a.partials + chunk * a.n_sums * a.partial_stride;
    for (int s = 0; s < a.n_sums; ++s) __builtin_memset(partials + s * a.partial_stride, 0, a.n_columns * sizeof(C));
    const auto sum_at = [&](int index) { return index < 0 ? nullptr : partials + index * a.partial_stride; };
    const ParameterSums<C> sums{sum_at(a.sum_dweight), sum_at(a.sum_dbias), sum_at(a.sum_dx_bias), sum_at(a.sum_dlayer_scale)};
    const int64_t group = chunk / a.group_chunks, group_end = (group + 1) * a.group_rows;
    const int64_t begin = group * a.group_rows + (chunk - group * a.group_chunks) * a.rows_per_chunk;
    const int64_t end = begin + a.rows_per_chunk < group_end ? begin + a.rows_per_chunk : group_end;
    const Present<true, RMS, EPILOGUE> common(a, sums);
    const Present<false, RMS, EPILOGUE> any(a, sums);
    int64_t row = begin;
    if constexpr (kSpecialized<C> && !EPILOGUE)
      if (a.direct) row = narrow_rows<S, RMS>(a, sums, row, end);
    for (; row < end; row += kRowBlock) {
      const int rows = row + kRowBlock <= end ? kRowBlock : int(end - row);
      const bool ahead = fetches && row + 2 * kRowBlock <= end;
      if constexpr (kSpecialized<C>)
        if (rows == kRowBlock && common.holds()) {
          backward_block<C, S>(a, workspace, row, rows, ahead, sums, common);
          continue;
        }
      backward_block<C, S>(a, workspace, row, rows, ahead, sums, any);
    }
  }
  if (a.nontemporal) fence_nontemporal();
}

inline int64_t backward_workspace(const Backward& a) {
  return times(kRowBlock * staged_rows(a), padded(a.n_columns), a.wide ? 8 : 4);
}

inline void backward(const Backward& a, void* workspace, int64_t first_chunk, int64_t end_chunk) {
  with_row_types(a.wide, a.direct, a.row_dtype, [&](auto c, auto s) {
    typedef decltype(c) C;
    typedef decltype(s) S;
    auto run = a.rms ? backward_chunks<C, S, true, true> : backward_chunks<C, S, false, true>;
    if constexpr (kSpecialized<C>)
      if (!a.epilogue) run = a.rms ? backward_chunks<C, S, true, false> : backward_chunks<C, S, false, false>;
    run(a, (char*)workspace, first_chunk, end_chunk);
  });
}

// A parameter, or a sample's, as an array of the compute type, plus `shift`.
inline void parameter(const Operand& o, int64_t sample, int64_t n, bool wide, double shift, void* out) {
  const auto run = [&](auto* p) {
    stage_in(o, sample, n, p);
    for (int64_t j = 0; j < n && shift != 0; ++j) p[j] += decltype(*p + 0)(shift);
  };
  if (wide)
    run((double*)out);
  else
    run((float*)out);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
