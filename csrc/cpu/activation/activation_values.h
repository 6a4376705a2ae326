// Activations and their gradients, a native register at a time.
//
// Both halves of a bell are computed from the small one, e^-|w| or the normal distribution's tail, which does not
// cancel: what torch computes as 1 + erf(u) or 1 + tanh(u) has no correct digit left where u is below -5.
#pragma once

#include "activation_args.h"
#include "../support/exponential.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// sigmoid(|w|) and sigmoid(-|w|).
template <class C>
struct Sigmoid {
  Native<C> large, small;
  FN_INLINE explicit Sigmoid(Native<C> w) {
    const Native<C> e = exponential(-magnitude(w));
    large = 1.0f / (1.0f + e);
    small = e * large;
  }
};

// The standard normal distribution below u, and its density but for a factor: bell is e^(-u^2 / 2).
template <class C>
struct Normal;

// The tail below -|u| is bell * R(|u|), and R, which falls like 1 / |u|, is a quotient of polynomials whose coefficients are
// all positive, so that nothing cancels: minimax, within 2^-26.8 of R relatively for |u| up to 14.5, and exactly 1/2 at 0.
// u^2 is split, because the exponential makes an absolute error of its argument a relative one. The exponential is made
// as in exponential.h, of rho = -2 r, which saves halving u^2, with a polynomial within 2^-28.2; both parts of 2 ln 2 have
// products with n that are exact.
template <>
struct Normal<float> {
  Floats below, bell;
  FN_INLINE explicit Normal(Floats u) {
    const Floats t = magnitude_at_most(u, 14.5f), t2 = t * t;  // there bell is 0
    const Floats head = (Floats)((Native<int32_t>)t & 0x7ffff000);
    const Floats n = nearest_integer(t2 * -0.72134752f);
    const Floats low = plus_exact((t - head) * (t + head), n, 2.8572394512593746e-6f);
    const Floats rho = plus_exact(head * head, n, 1.38629150390625f) + low, rho2 = rho * rho;
    const Floats p01 = rho * -2.083315141e-2f + 1.249999851e-1f, p23 = rho * -2.615212870e-4f + 2.604266861e-3f;
    const Floats p = p01 + (p23 + rho2 * 2.159442920e-5f) * rho2;
    bell = scaled(plus_exact(p * rho2, rho, -0.5f) + 1.0f, n);
    const Floats over2 = (t2 * 3.989470601e-1f + 1.784136200e+1f) + t * 3.949308634f;
    const Floats under2 = ((t + 9.900092125f) * t2 + t * 4.570677185e+1f) + 1.172244797e+2f;
    const Floats over = (t * 4.273707581e+1f + 4.883481979e+1f) + over2 * t2;
    const Floats under = (t * 1.634032745e+2f + 2 * 4.883481979e+1f) + under2 * t2;
    const Floats tail = bell * (over / under);
    below = u < 0.0f ? tail : 1.0f - tail;
  }
};

// Below by libm, an element at a time.
template <>
struct Normal<double> {
  Doubles below, bell;
  FN_INLINE explicit Normal(Doubles u) : bell(exponential(u * u * -0.5)) {
    for (int i = 0; i < kBytes / 8; ++i) below[i] = 0.5 * __builtin_erfc(u[i] * -0.70710678118654752);
  }
};

constexpr double kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
constexpr double kFar = 1e6;  // u^2 no larger than this: w is far past where sigmoid(w) is 0 or 1, and finite

// Of u sigmoid(w), w = u (kLinear + kCubic u^2).
template <int ACTIVATION>
constexpr double kLinear = kActivations[ACTIVATION].linear;
template <int ACTIVATION>
constexpr double kCubic = kActivations[ACTIVATION].cubic;
#define FN_HAS_SIGMOID(ACTIVATION) \
  static_assert(kLinear<ACTIVATION> > 0, "an activation that is not u sigmoid(w) needs a branch of its own")

template <int ACTIVATION, class C>
FN_INLINE Native<C> activate(Native<C> u) {
  if constexpr (ACTIVATION == kRelu) {
    return u <= 0.0f ? Native<C>{} : u;
  } else if constexpr (ACTIVATION == kGelu) {
    return u * Normal<C>(u).below;
  } else {
    FN_HAS_SIGMOID(ACTIVATION);
    constexpr C linear = C(kLinear<ACTIVATION>), cubic = C(kCubic<ACTIVATION>);
    const Native<C> w = cubic == 0 ? u * linear : u * (linear + cubic * (u * u));
    const Native<C> e = exponential(-magnitude(w));
    return (u < 0.0f ? u * e : u) / (1.0f + e);
  }
}

// d times the slope at u. At an infinite u the slope is NaN, as torch's is; 1 where relu's u is NaN.
template <int ACTIVATION, class C>
FN_INLINE Native<C> pull_back(Native<C> u, Native<C> d) {
  if constexpr (ACTIVATION == kRelu) {
    return u <= 0.0f ? Native<C>{} : d;
  } else if constexpr (ACTIVATION == kGelu) {
    const Normal<C> normal(u);
    return d * (normal.below + u * (normal.bell * C(kDensity)));
  } else {
    FN_HAS_SIGMOID(ACTIVATION);
    constexpr C linear = C(kLinear<ACTIVATION>), cubic = C(kCubic<ACTIVATION>), far = C(kFar);
    Native<C> square = u * u;
    square = square > far ? Native<C>{} + far : square;
    const Sigmoid<C> sigmoid(cubic == 0 ? u * linear : u * (linear + cubic * square));
    const auto negative = u < 0.0f;
    const Native<C> at = negative ? sigmoid.small : sigmoid.large, opposite = negative ? sigmoid.large : sigmoid.small;
    const Native<C> growth = cubic == 0 ? Native<C>{} + linear : linear + C(3 * kCubic<ACTIVATION>) * square;  // w'
    return d * (at + (at * u) * (opposite * growth));  // in this order no finite u gives 0 times infinity
  }
}

template <int ACTIVATION, class C>
FN_INLINE Vec<C> activated(const Vec<C>& u) {
  Vec<C> r;
  FN_EACH(k) r.v[k] = activate<ACTIVATION, C>(u.v[k]);
  return r;
}

template <int ACTIVATION, class C>
FN_INLINE Vec<C> pulled_back(const Vec<C>& u, const Vec<C>& d) {
  Vec<C> r;
  FN_EACH(k) r.v[k] = pull_back<ACTIVATION, C>(u.v[k], d.v[k]);
  return r;
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
