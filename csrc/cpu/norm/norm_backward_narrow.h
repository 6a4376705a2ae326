// The backward of common calls on rows of up to eight vectors, with the number of vectors as a constant.
//
// The arithmetic of a row of 64 columns takes about 50 cycles of the processor. The general form took 80 more to work out
// where each row lies and which operands are there. The sums are the same, in the same order.
#pragma once

#include "norm_forward.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// Where the gradients of parameters are summed; null for those that nobody wants.
template <class C>
struct ParameterSums {
  C *dweight, *dbias, *dx_bias, *dlayer_scale;
};

// Rows a constant step apart.
template <class S>
struct Steps {
  const S* data;
  int64_t step;

  explicit Steps(const Operand& o) : data((const S*)o.data), step(o.row_dims ? o.rows[0].stride : 0) {}
  FN_INLINE const S* row(int64_t r) const { return data + r * step; }
};

// Blocks of kRowBlock rows, from the block's first row on.
template <class S, bool RMS, int V>
struct NarrowBlocks {
  static constexpr int kLanes = Vec<float>::kLanes, kColumns = V * kLanes;
  const Backward& a;
  const ParameterSums<float>& sums;
  const Steps<S> dnormed, saved, dresidual_out;
  const float *const weight, *const means, *const rstds;

  NarrowBlocks(const Backward& a, const ParameterSums<float>& sums)
      : a(a), sums(sums), dnormed(a.dnormed), saved(a.saved), dresidual_out(a.dresidual_out),
        weight((const float*)a.weight), means(RMS ? nullptr : (const float*)a.stats),
        rstds((const float*)a.stats + (RMS ? 0 : a.n_rows)) {}

  static FN_INLINE Vec<float> load(const S* p) { return Stored<float, S>::load(p).value(); }
  FN_INLINE Vec<float> normalized(const S* z, int64_t row) const {
    const Vec<float> v = load(z);
    return (RMS ? v : v - Vec<float>(means[row])) * Vec<float>(rstds[row]);
  }

  // Row means of g xhat and of g.
  FN_INLINE void row_means(int64_t row, float* product, float* shift) const {
    Vec<float> products[kRowBlock], shifts[kRowBlock];
    each<kRowBlock>([&](auto r) __attribute__((always_inline)) {
      Sums<float> of_products, of_shifts;
      of_products.clear(), of_shifts.clear();
      const S *const dy = dnormed.row(row + r), *const z = saved.row(row + r);
      each<V>([&](auto i) __attribute__((always_inline)) {
        const int j = i * kLanes, k = V >= 4 ? i % 4 : 0;  // the sum that sum_over_columns would take
        const Vec<float> g = load(dy + j) * Vec<float>::load(weight + j);
        of_products.add(k, g * normalized(z + j, row + r));
        if (!RMS) of_shifts.add(k, g);
      });
      products[r] = of_products.total(), shifts[r] = of_shifts.total();
    });
    sums_of_lanes<float, kRowBlock>([&](int r) __attribute__((always_inline)) { return products[r]; }, product);
    if (!RMS) sums_of_lanes<float, kRowBlock>([&](int r) __attribute__((always_inline)) { return shifts[r]; }, shift);
    for (int r = 0; r < kRowBlock; ++r) {
      product[r] = product[r] / float(kColumns);
      if (!RMS) shift[r] = shift[r] / float(kColumns);
    }
  }

  template <class HAS>
  FN_INLINE void block(int64_t row, HAS has_dresidual_out) const {
    float product[kRowBlock], shift[kRowBlock];
    row_means(row, product, shift);
    S* const dx = (S*)a.dx + row * kColumns;
    // From the first or the last vector on: V is a power of two.
    const int order = stores_run_ahead(dx, saved.row(row), dnormed.row(row)) ? V - 1 : 0;
    for (int i = 0; i < V; ++i) {
      const int j = (i ^ order) * kLanes;
      const Vec<float> w = Vec<float>::load(weight + j);
      Vec<float> sw(0.0f), sb(0.0f), dys[kRowBlock], xhats[kRowBlock];
      each<kRowBlock>([&](auto r) __attribute__((always_inline)) {
        dys[r] = load(dnormed.row(row + r) + j), xhats[r] = normalized(saved.row(row + r) + j, row + r);
      });
      each<kRowBlock>([&](auto r) __attribute__((always_inline)) {
        Vec<float> d = dys[r] * w - xhats[r] * Vec<float>(product[r]);
        if (!RMS) d = d - Vec<float>(shift[r]);
        d = d * Vec<float>(rstds[row + r]);
        if (has_dresidual_out) d = d + load(dresidual_out.row(row + r) + j);
        sw = sw + dys[r] * xhats[r];
        if (!RMS) sb = sb + dys[r];
        Whole{}.store(Stored<float, S>::of(d), dx + r * kColumns + j, a.nontemporal);
      });
      (Vec<float>::load(sums.dweight + j) + sw).store(sums.dweight + j);
      if (!RMS) (Vec<float>::load(sums.dbias + j) + sb).store(sums.dbias + j);
    }
  }

  int64_t run(int64_t row, int64_t end) const {
    const auto blocks = [&](auto has_dresidual_out) __attribute__((always_inline)) {
      for (; row + kRowBlock <= end; row += kRowBlock) block(row, has_dresidual_out);
    };
    if (dresidual_out.data)
      blocks(std::true_type{});
    else
      blocks(std::false_type{});
    return row;
  }
};

// The rows from `row` on that this form serves; the first that it leaves.
template <class S, bool RMS>
FN_INLINE int64_t narrow_rows(const Backward& a, const ParameterSums<float>& sums, int64_t row, int64_t end) {
  const auto steps = [](const Operand& o) { return o.row_dims <= 1; };
  const bool parameters = a.weight && sums.dweight && (RMS ? !sums.dbias : bool(sums.dbias));
  if (!parameters || a.saved_is_normed || !a.dx || a.dresidual) return row;
  if (!steps(a.dnormed) || !steps(a.saved) || !steps(a.dresidual_out)) return row;
  constexpr int L = Vec<float>::kLanes;
  switch (a.n_columns) {
    case L: return NarrowBlocks<S, RMS, 1>(a, sums).run(row, end);
    case 2 * L: return NarrowBlocks<S, RMS, 2>(a, sums).run(row, end);
    case 4 * L: return NarrowBlocks<S, RMS, 4>(a, sums).run(row, end);
    case 8 * L: return NarrowBlocks<S, RMS, 8>(a, sums).run(row, end);
    default: return row;
  }
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
