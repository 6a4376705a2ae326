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

// The tail below -|u| is bell * R(|u|), and R, which falls like 1 / |u|, is P(s) / (|u| + 3) with
// s = (|u| - 3) / (|u| + 3) and a minimax polynomial P, relatively within 2^-26 of R for |u| from 1 to 14.5. u^2 is split,
// because the exponential makes an absolute error of its argument a relative one. Where |u| < 1 the distribution is 1/2 and
// an odd polynomial, within 2^-30: there the tail's rounding errors would be several of the sum's.
template <>
struct Normal<float> {
  Floats below, bell;
  FN_INLINE explicit Normal(Floats u) {
    Floats t = magnitude(u);
    t = t > 20.0f ? Floats{} + 20.0f : t;  // e^-200 is 0; NaN stays
    const Floats head = (Floats)((Native<int32_t>)t & 0x7ffff000);
    bell = exponential(head * head * -0.5f, (t - head) * (t + head) * -0.5f);
    const Floats q = 1.0f / (t + 3.0f), s = (t - 3.0f) * q, s2 = s * s;
    const Floats p01 = s * -5.09331907e-1f + 7.29083698e-1f, p23 = s * -4.72651594e-2f + 2.30016752e-1f;
    const Floats p45 = s * 6.98330118e-3f - 1.04443021e-2f, p67 = s * -1.02220967e-3f + 9.09316335e-4f;
    const Floats p = (p01 + p23 * s2) + (p45 + p67 * s2) * (s2 * s2);
    const Floats tail = bell * (p * q), square = t * t;
    Floats near = square * -7.65420737e-6f + 1.13486367e-4f;
    near = near * square - 1.18632994e-3f;
    near = near * square + 9.97332341e-3f;
    near = near * square - 6.64903599e-2f;
    near = near * square + 3.98942280e-1f;
    below = t < 1.0f ? 0.5f + u * near : u < 0.0f ? tail : 1.0f - tail;
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
