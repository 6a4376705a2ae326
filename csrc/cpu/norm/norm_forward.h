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

template <class C>
struct Sums {
  Vec<C> part[4] = {Vec<C>(C(0)), Vec<C>(C(0)), Vec<C>(C(0)), Vec<C>(C(0))}, blocks = part[0], whole = part[0];
  int folds = 0;
  FN_INLINE void fold() {
    blocks = blocks + ((part[0] + part[1]) + (part[2] + part[3]));
    part[0] = part[1] = part[2] = part[3] = Vec<C>(C(0));
    if (++folds % kSumSteps == 0) whole = whole + blocks, blocks = Vec<C>(C(0));
  }
  FN_INLINE C total() const {
    const Vec<C> rest = (part[0] + part[1]) + (part[2] + part[3]);
    return sum(folds ? whole + (blocks + rest) : rest);
  }
};

// z = residual + drop_path(layer_scale * dropout(x + x_bias)), rounded to S: stored to z_out, kept in z where given.
// Returns the sum of z * scale, or for RMSNorm that of its squares.
template <class C, class S, bool EPILOGUE>
FN_INLINE C combine(const Forward& a, const S* x, const S* residual, const Int<C>* masks, Path path, S* z_out, C* z,
                    C scale) {
  Sums<C> sums;
  const bool rms = a.rms;
  sum_over_columns<C>(a.n_columns, [&](auto extent, int64_t j, int k) __attribute__((always_inline)) {
    Vec<C> v = extent.template load<C>(x + j);
    if (EPILOGUE) v = branch(At<C, decltype(extent)>{a, extent, masks, path, j}, v);
    if (residual) v = extent.template load<C>(residual + j) + v;
    const auto stored = Stored<C, S>::of(v);
    if (z_out) extent.store(stored, z_out + j);
    v = stored.value();
    if (z) v.store(z + j);
    sums.part[k] = sums.part[k] + (rms ? v * v : v * Vec<C>(scale));
  }, [&]() __attribute__((always_inline)) { sums.fold(); });
  return sums.total();
}

template <class C>
FN_INLINE C centred_squares(const C* z, int64_t n, C mean) {
  Sums<C> sums;
  const Vec<C> centre(mean);
  sum_over_columns<C>(n, [&](auto extent, int64_t j, int k) __attribute__((always_inline)) {
    const Vec<C> c = extent.only(extent.template load<C>(z + j) - centre);
    sums.part[k] = sums.part[k] + c * c;
  }, [&]() __attribute__((always_inline)) { sums.fold(); });
  return sums.total();
}

// next_x and next_residual are the next row's operands, fetched meanwhile: the processor's own guesses end with a row. In
// float32 that gained 3 to 8 %; in 16 bits nothing, and there they are null.
template <class C, class S>
FN_INLINE void normalize(const Forward& a, const C* z, C mean, C rstd, S* out, const S* next_x, const S* next_residual) {
  const C *weight = (const C*)a.weight, *bias = (const C*)a.bias;
  const Vec<C> centre(mean), factor(rstd);
  const bool rms = a.rms;
  over_columns<C>(a.n_columns, [&](auto extent, int64_t j) __attribute__((always_inline)) {
    if (next_x) __builtin_prefetch(next_x + j, 0, 2);
    if (next_residual) __builtin_prefetch(next_residual + j, 0, 2);
    Vec<C> v = extent.template load<C>(z + j);
    if (!rms) v = v - centre;
    v = v * factor;
    if (weight) v = v * extent.template load<C>(weight + j);
    if (bias) v = v + extent.template load<C>(bias + j);
    extent.store(Stored<C, S>::of(v), out + j);
  });
}

// The smallest power of two that is no less than n: sums scaled by its inverse cannot overflow, and lose nothing.
FN_INLINE double power_of_two(int64_t n) { return n <= 1 ? 1.0 : double(int64_t(1) << (64 - __builtin_clzll(n - 1))); }

template <class C, class S, bool EPILOGUE>
void forward_rows(const Forward& a, char* workspace, int64_t first_row, int64_t end_row) {
  const bool direct = sizeof(S) != sizeof(C) || a.direct;  // rows that are staged are of the compute type
  const int64_t n = a.n_columns, room = padded(n);
  C* const z_row = (C*)workspace;
  C *const x_row = z_row + room, *const residual_row = x_row + room;
  Int<C>* const masks = a.element.on ? (Int<C>*)(direct ? x_row : residual_row + room) : nullptr;
  const double power = power_of_two(n);
  const C scale = C(1 / power);
  // Of a mean: for float a factor in double is as good as a division, which a narrow row would wait for.
  const auto mean_of = [&, wide = sizeof(C) == 8, inverse = 1 / double(n)](double total) __attribute__((always_inline)) {
    return wide ? total / double(n) : total * inverse;
  };
  C *const means = a.rms ? nullptr : (C*)a.stats, *const rstds = (C*)a.stats + (a.rms ? 0 : a.n_rows);
  for (int64_t row = first_row; row < end_row; ++row) {
    const Path path = EPILOGUE ? path_of(a, row) : Path::kNone;
    if (EPILOGUE && masks) row_masks(a, row, masks);
    const C* z = z_row;
    C total;
    if (direct) {
      const S *x = row_of<S>(a.x, row), *residual = row_of<S>(a.residual, row);
      S* z_out = a.z ? (S*)a.z + row * n : nullptr;
      C* keep = z_row;
      if (sizeof(S) == sizeof(C)) {  // then z can be read where it is
        const void* source = z_out ? (const void*)z_out : EPILOGUE || residual ? nullptr : (const void*)x;
        if (source) z = (const C*)source, keep = nullptr;
      }
      total = combine<C, S, EPILOGUE>(a, x, residual, masks, path, z_out, keep, scale);
    } else {
      stage_in(a.x, row, n, x_row);
      if (a.residual.data) stage_in(a.residual, row, n, residual_row);
      combine<C, C, EPILOGUE>(a, x_row, a.residual.data ? residual_row : nullptr, masks, path, nullptr, z_row, scale);
      round_row(z_row, n, a.z_dtype, a.z, row * n);
      total = combine<C, C, false>(a, z_row, nullptr, nullptr, Path::kNone, nullptr, nullptr, scale);
    }
    // once a row, so in double: one rounding each
    const C mean = a.rms ? C(0) : C(mean_of(total * power));
    const C squares = a.rms ? total : centred_squares<C>(z, n, mean);
    const C rstd = C(1 / __builtin_sqrt(mean_of(squares) + a.eps));
    if (means) means[row] = mean;
    rstds[row] = rstd;
    if (direct) {
      const bool ahead = sizeof(S) == sizeof(C) && row + 1 < end_row;
      normalize<C, S>(a, z, mean, rstd, (S*)a.normed + row * n, ahead ? row_of<S>(a.x, row + 1) : nullptr,
                      ahead ? row_of<S>(a.residual, row + 1) : nullptr);
    } else {
      normalize<C, C>(a, z, mean, rstd, x_row, nullptr, nullptr);
      stage_out(x_row, n, a.normed_dtype, a.normed, row * n);
    }
  }
}

inline int64_t forward_workspace(const Forward& a) {
  const int64_t rows = (a.direct ? 1 : 3) + (a.element.on ? 1 : 0);
  return times(rows, padded(a.n_columns), a.wide ? 8 : 4);
}

inline void forward(const Forward& a, void* workspace, int64_t first_row, int64_t end_row) {
  with_row_types(a.wide, a.direct, a.row_dtype, [&](auto c, auto s) {
    const auto run = a.epilogue ? forward_rows<decltype(c), decltype(s), true> : forward_rows<decltype(c), decltype(s), false>;
    run(a, (char*)workspace, first_row, end_row);
  });
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
