// The forward of every norm of the family: one body for LayerNorm and RMSNorm, with and without the epilogue.
#pragma once

#include "../../common/epilogue.h"
#include "../support/philox.h"
#include "../support/rows.h"

namespace fusednorm_cpu {
namespace FN_ISA {

FN_INLINE Path path_of(const Common& a, int64_t row) {
  if (!a.path.on) return Path::kNone;
  return path_kept(a.seed, uint64_t(row / a.rows_per_sample), a.path.threshold) ? Path::kKept : Path::kDropped;
}

// What the epilogue finds at one vector of columns of a row.
template <class C, class E>
struct At {
  const Common& a;
  E extent;
  const Int<C>* masks;
  Path row_path;
  int64_t j;

  FN_INLINE bool has_x_bias() const { return a.x_bias; }
  FN_INLINE bool has_layer_scale() const { return a.layer_scale; }
  FN_INLINE bool drops() const { return masks; }
  FN_INLINE Path path() const { return row_path; }
  FN_INLINE Vec<C> x_bias() const { return extent.template load<C>((const C*)a.x_bias + j); }
  FN_INLINE Vec<C> layer_scale() const { return extent.template load<C>((const C*)a.layer_scale + j); }
  FN_INLINE C element_scale() const { return C(a.element.scale); }
  FN_INLINE C path_scale() const { return C(a.path.scale); }
  FN_INLINE Vec<C> kept(const Vec<C>& v) const { return v.kept(Vec<Int<C>>::load(masks + j)); }
  FN_INLINE void add(Vec<C>& sum, const Vec<C>& v) const { sum = sum + v; }
};

// Bytes of rows that are taken together: they stay in the first cache from one pass to the next.
constexpr int64_t kTogether = 12 << 10;

// A sum along a row, in four independent ones.
template <class C>
struct Sums {
  Vec<C> part[4], blocks, whole;
  int folds;

  FN_INLINE void clear() {
    part[0] = part[1] = part[2] = part[3] = blocks = whole = Vec<C>(C(0));
    folds = 0;
  }
  FN_INLINE void add(int k, const Vec<C>& v) { part[k] = part[k] + v; }
  FN_INLINE Vec<C> parts() const { return (part[0] + part[1]) + (part[2] + part[3]); }
  FN_INLINE void fold() {
    blocks = blocks + parts();
    part[0] = part[1] = part[2] = part[3] = Vec<C>(C(0));
    if (++folds % kSumSteps == 0) whole = whole + blocks, blocks = Vec<C>(C(0));
  }
  FN_INLINE Vec<C> total() const { return folds ? whole + (blocks + parts()) : parts(); }
};

// R rows that are taken together over the columns. All are read and written as S.
template <class C, class S, int R>
struct Rows {
  const S *x[R], *residual[R], *z[R];  // z is where the normalization reads it
  S *z_out[R], *out[R];
  const S *next_x[R], *next_residual[R];  // of the next rows, to be fetched; or null
  const Int<C>* masks[R];
  Path path[R];
  C mean[R], rstd[R];
};

// What stands before the norm: nothing, the addition of a residual, or the whole epilogue.
enum class Before { kNothing, kResidual, kEpilogue };

// z = residual + drop_path(layer_scale * dropout(x + x_bias)), rounded to S, and stored to z_out where given.
// Totals are of z, or for RMSNorm of its squares.
template <class C, class S, Before BEFORE, bool RMS, int R>
FN_INLINE void combine(const Forward& a, const Rows<C, S, R>& b, C* totals) {
  Sums<C> sums[R];
  each<R>([&](auto r) __attribute__((always_inline)) { sums[r].clear(); });
  const bool residual = BEFORE == Before::kResidual || b.residual[0];
  sum_over_columns<C>(a.n_columns, [&](auto extent, int64_t j, int k) __attribute__((always_inline)) {
    each<R>([&](auto r) __attribute__((always_inline)) {
      Vec<C> v = extent.template load<C>(b.x[r] + j);
      if (BEFORE == Before::kEpilogue) v = branch(At<C, decltype(extent)>{a, extent, b.masks[r], b.path[r], j}, v);
      if (BEFORE != Before::kNothing) {
        if (residual) v = extent.template load<C>(b.residual[r] + j) + v;
        const auto z = Stored<C, S>::of(v);
        extent.store(z, b.z_out[r] + j);
        v = z.value();
      }
      sums[r].add(k, RMS ? v * v : v);
    });
  }, [&]() __attribute__((always_inline)) { each<R>([&](auto r) __attribute__((always_inline)) { sums[r].fold(); }); });
  sums_of_lanes<C, R>([&](int r) __attribute__((always_inline)) { return sums[r].total(); }, totals);
}

// The smallest power of two that is no less than n: sums scaled by its inverse cannot overflow, and lose nothing.
FN_INLINE double power_of_two(int64_t n) { return n <= 1 ? 1.0 : double(int64_t(1) << (64 - __builtin_clzll(n - 1))); }

// The mean of a row whose sum overflows, or which is not finite.
template <class C, class S>
__attribute__((noinline, cold)) double scaled_mean(const S* z, int64_t n) {
  const double power = power_of_two(n);
  const Vec<C> scale(C(1 / power));
  Sums<C> sums;
  sums.clear();
  sum_over_columns<C>(n, [&](auto extent, int64_t j, int k) __attribute__((always_inline)) {
    sums.add(k, extent.template load<C>(z + j) * scale);
  }, [&]() __attribute__((always_inline)) { sums.fold(); });
  return sum(sums.total()) * power / double(n);
}

template <class C, class S, int R>
FN_INLINE void centred_squares(const Rows<C, S, R>& b, int64_t n, C* totals) {
  Sums<C> sums[R];
  each<R>([&](auto r) __attribute__((always_inline)) { sums[r].clear(); });
  sum_over_columns<C>(n, [&](auto extent, int64_t j, int k) __attribute__((always_inline)) {
    each<R>([&](auto r) __attribute__((always_inline)) {
      const Vec<C> c = extent.only(extent.template load<C>(b.z[r] + j) - Vec<C>(b.mean[r]));
      sums[r].add(k, c * c);
    });
  }, [&]() __attribute__((always_inline)) { each<R>([&](auto r) __attribute__((always_inline)) { sums[r].fold(); }); });
  sums_of_lanes<C, R>([&](int r) __attribute__((always_inline)) { return sums[r].total(); }, totals);
}

// What the next rows read is fetched meanwhile, since the processor's own guesses end with a row. In 16 bits nothing was
// gained by it.
// Weight and bias are arrays of W.
template <class W, class C, class S, Before BEFORE, bool RMS, int R, class AFFINE, class PAST>
FN_INLINE void normalize(const Forward& a, const Rows<C, S, R>& b, AFFINE affine, PAST nontemporal) {
  const W* const weight = (const W*)a.weight;
  const W* const bias = (const W*)a.bias;
  const bool has_weight = affine || weight, has_bias = affine ? !RMS : bool(bias), fetch = sizeof(S) == sizeof(C) && b.next_x[0];
  const bool fetch_residual = BEFORE != Before::kNothing && fetch && b.next_residual[0];
  over_columns<C>(a.n_columns, [&](auto extent, int64_t j) __attribute__((always_inline)) {
    Vec<C> w, shift;
    if (has_weight) w = extent.template load<C>(weight + j);
    if (has_bias) shift = extent.template load<C>(bias + j);
    each<R>([&](auto r) __attribute__((always_inline)) {
      if (fetch) __builtin_prefetch(b.next_x[r] + j, 0, 2);
      if (fetch_residual) __builtin_prefetch(b.next_residual[r] + j, 0, 2);
      Vec<C> v = extent.template load<C>(b.z[r] + j);
      if (!RMS) v = v - Vec<C>(b.mean[r]);
      v = v * Vec<C>(b.rstd[r]);
      if (has_weight) v = v * w;
      if (has_bias) v = v + shift;
      extent.store(Stored<C, S>::of(v), b.out[r] + j, nontemporal);
    });
  }, stores_run_ahead(b.out[0], b.z[0]));
}

// Of n columns, from a total. Once a row, so in double: one rounding each. For float a factor is as good as a division,
// which a narrow row would wait for.
template <class C>
struct Mean {
  const double n, inverse = 1 / n;
  FN_INLINE double of(double total) const { return sizeof(C) == 8 ? total / n : total * inverse; }
};

// The means of rows, and their sums of centred squares.
template <class C, class S, Before BEFORE, int R>
FN_INLINE void moments(const Forward& a, Rows<C, S, R>& b, const Mean<C>& mean, C* squares) {
  C totals[R];
  combine<C, S, BEFORE, false, R>(a, b, totals);
  for (int r = 0; r < R; ++r) {
    b.mean[r] = C(mean.of(totals[r]));
    if (__builtin_expect(!__builtin_isfinite(totals[r]), 0)) b.mean[r] = C(scaled_mean<C>(b.z[r], a.n_columns));
  }
  centred_squares<C, S, R>(b, a.n_columns, squares);
}

template <class C, class S, Before BEFORE, bool RMS, int R>
FN_INLINE void forward_block(const Forward& a, Rows<C, S, R>& b, const Mean<C>& mean, C* means, C* rstds) {
  C squares[R];
  if constexpr (RMS)
    combine<C, S, BEFORE, true, R>(a, b, squares);
  else
    moments<C, S, BEFORE, R>(a, b, mean, squares);
  for (int r = 0; r < R; ++r) {
    b.rstd[r] = rstds[r] = C(1 / __builtin_sqrt(mean.of(squares[r]) + a.eps));
    if (means) means[r] = b.mean[r];
  }
  const bool affine = a.weight && RMS == !a.bias;
  if constexpr (sizeof(S) == 2 && R == 1)
    if (a.parameters_as_rows) return normalize<S, C, S, BEFORE, RMS, R>(a, b, affine, a.nontemporal);
  // A loop of its own for the common case: conditions inside of it took 60 % more time.
  if (kSpecialized<C> && affine && !a.nontemporal)
    normalize<C, C, S, BEFORE, RMS, R>(a, b, std::true_type{}, std::false_type{});
  else
    normalize<C, C, S, BEFORE, RMS, R>(a, b, affine, a.nontemporal);
}

// Rows as they lie.
template <class C, class S, Before BEFORE, bool RMS, int R>
FN_INLINE void forward_direct(const Forward& a, char* workspace, int64_t row, bool ahead, const Mean<C>& mean, C* means,
                              C* rstds) {
  constexpr bool kEpilogue = BEFORE == Before::kEpilogue;
  const int64_t n = a.n_columns, room = padded(n);
  Rows<C, S, R> b;
  for (int r = 0; r < R; ++r) {
    Int<C>* const masks = (Int<C>*)workspace + r * room;
    b.masks[r] = kEpilogue && a.element.on ? masks : nullptr;
    if (kEpilogue && a.element.on) row_masks(a, row + r, masks);
    b.path[r] = kEpilogue ? path_of(a, row + r) : Path::kNone;
    b.x[r] = row_of<S>(a.x, row + r), b.residual[r] = row_of<S>(a.residual, row + r);
    b.out[r] = (S*)a.normed + (row + r) * n;
    // z that nobody keeps stands where the result will, which is written after it is read
    b.z_out[r] = a.z ? (S*)a.z + (row + r) * n : b.out[r];
    b.z[r] = BEFORE == Before::kNothing ? b.x[r] : b.z_out[r];
    b.next_x[r] = ahead ? row_of<S>(a.x, row + R + r) : nullptr;
    b.next_residual[r] = ahead ? row_of<S>(a.residual, row + R + r) : nullptr;
  }
  forward_block<C, S, BEFORE, RMS, R>(a, b, mean, means, rstds);
}

// A row that is read and written in other dtypes, or with strides, by way of rows of C.
template <class C, bool RMS>
FN_INLINE void forward_staged(const Forward& a, C* workspace, int64_t row, const Mean<C>& mean, C* means, C* rstds) {
  const int64_t n = a.n_columns, room = padded(n);
  C *const x = workspace, *const residual = x + room, *const z = residual + room;
  Int<C>* const masks = a.element.on ? (Int<C>*)(z + room) : nullptr;
  if (masks) row_masks(a, row, masks);
  stage_in(a.x, row, n, x);
  if (a.residual.data) stage_in(a.residual, row, n, residual);
  Rows<C, C, 1> b{{x}, {a.residual.data ? residual : nullptr}, {z}, {z}, {x}, {nullptr}, {nullptr}, {masks},
                  {a.epilogue ? path_of(a, row) : Path::kNone}, {}, {}};
  C unrounded;
  combine<C, C, Before::kEpilogue, RMS, 1>(a, b, &unrounded);
  round_row(z, n, a.z_dtype, a.z, row * n);
  b.x[0] = z;
  forward_block<C, C, Before::kNothing, RMS, 1>(a, b, mean, means, rstds);
  stage_out(x, n, a.normed_dtype, a.normed, row * n);
}

template <class C, class S, Before BEFORE, bool RMS>
void direct_rows(const Forward& a, char* workspace, int64_t first_row, int64_t end_row) {
  const Mean<C> mean{double(a.n_columns)};
  C *const means = RMS ? nullptr : (C*)a.stats, *const rstds = (C*)a.stats + (RMS ? 0 : a.n_rows);
  int64_t row = first_row;
  const auto block = [&](auto rows) __attribute__((always_inline)) {
    constexpr int R = rows;
    for (; row + R <= end_row; row += R)
      forward_direct<C, S, BEFORE, RMS, R>(a, workspace, row, row + 2 * R <= end_row, mean, means ? means + row : nullptr,
                                           rstds + row);
  };
  const bool together = !a.parameters_as_rows && kRowBlock * times(a.n_columns, sizeof(S)) <= kTogether;
  if constexpr (kUnrolled && kSpecialized<C>)
    if (together) block(std::integral_constant<int, kRowBlock>{});
  block(std::integral_constant<int, 1>{});
  if (a.nontemporal) fence_nontemporal();
}

template <class C, bool RMS>
void staged_rows(const Forward& a, char* workspace, int64_t first_row, int64_t end_row) {
  const Mean<C> mean{double(a.n_columns)};
  C *const means = RMS ? nullptr : (C*)a.stats, *const rstds = (C*)a.stats + (RMS ? 0 : a.n_rows);
  for (int64_t row = first_row; row < end_row; ++row)
    forward_staged<C, RMS>(a, (C*)workspace, row, mean, means ? means + row : nullptr, rstds + row);
}

inline int64_t forward_workspace(const Forward& a) {
  const int64_t masks = a.element.on ? (a.direct ? kRowBlock : 1) : 0;
  return times((a.direct ? 0 : 3) + masks, padded(a.n_columns), a.wide ? 8 : 4);
}

template <bool RMS>
void forward_of(const Forward& a, char* workspace, int64_t first_row, int64_t end_row) {
  with_row_types(a.wide, a.direct, a.row_dtype, [&](auto c, auto s) {
    typedef decltype(c) C;
    typedef decltype(s) S;
    if (std::is_same_v<C, S> && !a.direct) return staged_rows<C, RMS>(a, workspace, first_row, end_row);
    auto run = direct_rows<C, S, Before::kEpilogue, RMS>;
    if (!a.epilogue && !a.residual.data && !a.z) run = direct_rows<C, S, Before::kNothing, RMS>;
    if constexpr (kSpecialized<C>)
      if (!a.epilogue && a.residual.data) run = direct_rows<C, S, Before::kResidual, RMS>;
    run(a, workspace, first_row, end_row);
  });
}

inline void forward(const Forward& a, void* workspace, int64_t first_row, int64_t end_row) {
  (a.rms ? forward_of<true> : forward_of<false>)(a, (char*)workspace, first_row, end_row);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
