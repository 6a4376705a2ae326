// Logits of tiles, and their softmax, a native register at a time.
#pragma once

#include "attention_tile.h"
#include "../support/exponential.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// tanh: an odd polynomial (that of Cephes' tanhf) near 0, where a quotient of exponentials would cancel.
FN_INLINE Floats tangent(Floats x) {
  const Floats t = magnitude(x), e = exponential(t * -2.0f), square = x * x;
  const Native<uint32_t> sign = (Native<uint32_t>)x & 0x80000000u;
  const Floats far = (Floats)((Native<uint32_t>)((1.0f - e) / (1.0f + e)) | sign);
  Floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  return t < 0.625f ? x + x * (square * p) : far;
}

FN_INLINE Doubles tangent(Doubles x) {
  for (int i = 0; i < kBytes / 8; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

template <class C>
struct Logits {
  Native<C> scale, cap;
  bool capped;
  FN_INLINE explicit Logits(const AttentionCall& a)
      : scale(splat(C(a.scale))), cap(splat(C(a.softcap))), capped(a.softcap != 0) {}

  // Of products of queries and keys, with what is added to them; `slope` is the derivative of capped logits by uncapped
  // ones. Rounded once where the processor can: rounding a logit of 100 moves its weight by 4e-6 of it.
  FN_INLINE Native<C> of(Native<C> products, Native<C> added, Native<C>& slope) const {
    if (!capped) return multiply_add(products, scale, added);
    const Native<C> t = tangent(products * scale / cap);
    slope = splat(C(1)) - t * t;
    return multiply_add(cap, t, added);
  }
};

template <class C>
FN_INLINE Native<Int<C>> seen_lanes(Native<C> added) {
  return (Native<Int<C>>)(added != splat(-C(__builtin_inf())));
}

template <class C>
FN_INLINE Native<C> only(Native<C> value, Native<Int<C>> lanes) {
  return (Native<C>)((Native<Int<C>>)value & lanes);
}

// One step of a softmax that sees its keys tile by tile: m.logits become weights e^(logit - largest), dropped and scaled
// where `keep` says so; m.lse is the largest logit so far, m.delta the sum of weights, m.factors what to scale sums
// from before by. Rows are keys, lanes queries. Whether any factor is not 1.
//
// A NaN is never the largest: it makes NaN of its own queries' sums, as an infinite logit does.
template <class C>
__attribute__((noinline)) bool softmax_step(const AttentionCall& a, const Memory<C>& m, int64_t n_queries, int64_t n_keys,
                                            const C* hidden, const Int<C>* keep) {
  const Logits<C> logits(a);
  const Native<C> none = splat(-C(__builtin_inf())), zero = Native<C>{}, kept_scale = splat(C(a.element.scale));
  bool rescales = false;
  for (int64_t l = 0; l < n_queries; l += kNativeLanes<C>) {
    const Native<C> before = native_load(m.lse + l);
    Native<C> largest = before, slope;
    for (int64_t j = 0; j < n_keys; ++j) {
      C* const at = m.logits + j * kStride + l;
      const Native<C> added = hidden ? native_load(hidden + j * kStride + l) : zero;
      Native<C> x = logits.of(native_load(at), added, slope);
      if (hidden) x = seen_lanes<C>(added) ? x : none;
      native_store(x, at);
      largest = x > largest ? x : largest;
    }
    const Native<C> finite = largest == none ? zero : largest;  // -inf - -inf would be NaN
    const Native<C> factor = exponential(before - finite);
    Native<C> total = zero;
    for (int64_t j = 0; j < n_keys; ++j) {
      C* const at = m.logits + j * kStride + l;
      Native<C> weight = exponential(native_load(at) - finite);
      total = total + weight;
      if (keep) {
        Native<Int<C>> kept;
        __builtin_memcpy(&kept, keep + j * kStride + l, kBytes);
        weight = only<C>(weight * kept_scale, kept);
      }
      native_store(weight, at);
    }
    native_store(largest, m.lse + l);
    native_store(factor, m.factors + l);
    native_store(native_load(m.delta + l) * factor + total, m.delta + l);
    for (int i = 0; i < kNativeLanes<C>; ++i) rescales |= factor[i] != C(1);
  }
  return rescales;
}

// The same where rows are queries and lanes keys, with the same bits: a row's weights are added one after another.
template <class C>
__attribute__((noinline)) bool softmax_step_of_few(const AttentionCall& a, const Memory<C>& m, int64_t n_queries,
                                                   int64_t n_keys, const C* hidden, const Int<C>* keep) {
  constexpr int W = kNativeLanes<C>;
  const Logits<C> logits(a);
  const Native<C> none = splat(-C(__builtin_inf())), zero = Native<C>{}, kept_scale = splat(C(a.element.scale));
  bool rescales = false;
  for (int64_t r = 0; r < n_queries; ++r) {
    C* const row = m.logits + r * kStride;
    Native<C> slope, most_of_lanes = none;
    for (int64_t l = 0; l < n_keys; l += W) {
      const Native<C> added = hidden ? native_load(hidden + r * kStride + l) : zero;
      Native<C> x = logits.of(native_load(row + l), added, slope);
      if (hidden) x = seen_lanes<C>(added) ? x : none;
      for (int64_t i = n_keys - l; i < W; ++i) x[i] = -C(__builtin_inf());
      native_store(x, row + l);
      most_of_lanes = x > most_of_lanes ? x : most_of_lanes;
    }
    C largest = m.lse[r];
    for (int i = 0; i < W; ++i) largest = most_of_lanes[i] > largest ? most_of_lanes[i] : largest;
    const C finite = largest == -C(__builtin_inf()) ? C(0) : largest;  // -inf - -inf would be NaN
    const C factor = exponential(splat(m.lse[r] - finite))[0];
    C total = 0;
    for (int64_t l = 0; l < n_keys; l += W) {
      Native<C> weight = exponential(native_load(row + l) - splat(finite));
      for (int64_t i = 0; i < W && l + i < n_keys; ++i) total += weight[i];
      if (keep) {
        Native<Int<C>> kept;
        __builtin_memcpy(&kept, keep + r * kStride + l, kBytes);
        weight = only<C>(weight * kept_scale, kept);
      }
      native_store(weight, row + l);
    }
    m.lse[r] = largest, m.factors[r] = factor;
    m.delta[r] = m.delta[r] * factor + total;
    rescales |= factor != C(1);
  }
  return rescales;
}

// W. Kahan's sum, "Further remarks on reducing truncation errors", CACM 8(1), 1965: of equal terms, as the probabilities
// of few keys often are, a plain one errs the same way at each.
template <class C>
FN_INLINE void add_compensated(Native<C> term, C* total, C* excess) {
  const Native<C> before = native_load(total), corrected = term - native_load(excess), after = before + corrected;
  native_store((after - before) - corrected, excess);
  native_store(after, total);
}

// m.logits become dropped probabilities, m.slopes, which hold the products of dout and values, the gradients of the
// logits, uncapped and unscaled ones. Or where `of_mask` the probabilities before dropout, and the gradients of what a mask
// is added to. Statistics are in m.lse, m.norms, m.delta and m.factors, which has dlse. Where rows are keys, m.totals
// becomes each query's sum of the tile's probabilities.
template <class C, bool LANES_ARE_KEYS>
__attribute__((noinline)) void gradient_step(const AttentionCall& a, const Memory<C>& m, int64_t rows, int64_t lanes,
                                             const C* hidden, const Int<C>* keep, bool of_mask) {
  const Logits<C> logits(a);
  const Native<C> none = splat(-C(__builtin_inf())), kept_scale = splat(C(a.element.scale));
  if (!LANES_ARE_KEYS) __builtin_memset(m.totals, 0, 2 * kBlockSize * sizeof(C));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = 0; l < lanes; l += kNativeLanes<C>) {
      const int64_t at = r * kStride + l;
      const Native<C> lse = LANES_ARE_KEYS ? splat(m.lse[r]) : native_load(m.lse + l);
      const Native<C> delta = LANES_ARE_KEYS ? splat(m.delta[r]) : native_load(m.delta + l);
      const Native<C> dlse = LANES_ARE_KEYS ? splat(m.factors[r]) : native_load(m.factors + l);
      const Native<C> norm = LANES_ARE_KEYS ? splat(m.norms[r]) : native_load(m.norms + l);
      Native<C> slope = splat(C(1));
      const Native<C> added = hidden ? native_load(hidden + at) : Native<C>{};
      Native<C> x = logits.of(native_load(m.logits + at), added, slope), d = native_load(m.slopes + at);
      if (hidden) x = seen_lanes<C>(added) ? x : none;
      Native<C> p = exponential(x - lse) * norm;
      if (hidden) p = only<C>(p, seen_lanes<C>(added));  // an lse of NaN
      if (!LANES_ARE_KEYS) add_compensated(p, m.totals + l, m.totals + kBlockSize + l);
      Native<C> weight = p;
      if (keep) {
        Native<Int<C>> kept;
        __builtin_memcpy(&kept, keep + at, kBytes);
        weight = only<C>(p * kept_scale, kept);
        d = only<C>(d * kept_scale, kept);
      }
      d = p * ((d - delta) + dlse);  // d and delta may cancel exactly
      if (logits.capped && !of_mask) d = d * slope;
      if (hidden) d = only<C>(d, seen_lanes<C>(added));  // after the slope, which may be NaN too
      native_store(of_mask ? p : weight, m.logits + at);
      native_store(d, m.slopes + at);
    }
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
