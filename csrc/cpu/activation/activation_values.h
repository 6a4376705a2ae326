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
struct Sigmoid {
  Floats large, small;
  FN_INLINE explicit Sigmoid(Floats w) {
    const Floats e = exponential(-magnitude(w), Floats{});
    large = 1.0f / (1.0f + e);
    small = e * large;
  }
};

// The standard normal distribution below u, and its density but for a factor.
//
// The tail below -|u| is bell * R(|u|), and R, which falls like 1 / |u|, is P(s) / (|u| + 3) with
// s = (|u| - 3) / (|u| + 3) and a minimax polynomial P, relatively within 2^-26 of R for |u| from 1 to 14.5. u^2 is split,
// because the exponential makes an absolute error of its argument a relative one. Where |u| < 1 the distribution is 1/2 and
// an odd polynomial, within 2^-30: there the tail's rounding errors would be several of the sum's.
struct Normal {
  Floats below, bell;  // bell is e^(-u^2 / 2)
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

constexpr double kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
constexpr double kFar = 1e6;  // u^2 no larger than this: w is far past where sigmoid(w) is 0 or 1, and finite

// Of u sigmoid(w), w = u (kLinear + kCubic u^2).
template <int ACTIVATION>
constexpr double kLinear = kActivations[ACTIVATION].linear;
template <int ACTIVATION>
constexpr double kCubic = kActivations[ACTIVATION].cubic;
#define FN_HAS_SIGMOID(ACTIVATION) \
  static_assert(kLinear<ACTIVATION> > 0, "an activation that is not u sigmoid(w) needs a branch of its own")

template <int ACTIVATION>
FN_INLINE Floats activate(Floats u) {
  if constexpr (ACTIVATION == kRelu) {
    return u <= 0.0f ? Floats{} : u;
  } else if constexpr (ACTIVATION == kGelu) {
    return u * Normal(u).below;
  } else {
    FN_HAS_SIGMOID(ACTIVATION);
    constexpr float linear = float(kLinear<ACTIVATION>), cubic = float(kCubic<ACTIVATION>);
    const Floats w = cubic == 0 ? u * linear : u * (linear + cubic * (u * u));
    const Floats e = exponential(-magnitude(w), Floats{});
    return (u < 0.0f ? u * e : u) / (1.0f + e);
  }
}

// d times the slope at u. At an infinite u the slope is NaN, as torch's is; 1 where relu's u is NaN.
template <int ACTIVATION>
FN_INLINE Floats pull_back(Floats u, Floats d) {
  if constexpr (ACTIVATION == kRelu) {
    return u <= 0.0f ? Floats{} : d;
  } else if constexpr (ACTIVATION == kGelu) {
    const Normal normal(u);
    return d * (normal.below + u * (normal.bell * float(kDensity)));
  } else {
    FN_HAS_SIGMOID(ACTIVATION);
    constexpr float linear = float(kLinear<ACTIVATION>), cubic = float(kCubic<ACTIVATION>);
    Floats square = u * u;
    square = square > float(kFar) ? Floats{} + float(kFar) : square;
    const Sigmoid sigmoid(cubic == 0 ? u * linear : u * (linear + cubic * square));
    const auto negative = u < 0.0f;
    const Floats at = negative ? sigmoid.small : sigmoid.large, opposite = negative ? sigmoid.large : sigmoid.small;
    const Floats growth = cubic == 0 ? Floats{} + linear : linear + float(3 * kCubic<ACTIVATION>) * square;  // w'
    return d * (at + (at * u) * (opposite * growth));  // in this order no finite u gives 0 times infinity
  }
}

// In double by the functions of libm, an element at a time.
template <int ACTIVATION>
FN_INLINE double activate(double u) {
  if constexpr (ACTIVATION == kRelu) {
    return u <= 0 ? 0.0 : u;
  } else if constexpr (ACTIVATION == kGelu) {
    return u * (0.5 * __builtin_erfc(-u * 0.70710678118654752));
  } else {
    FN_HAS_SIGMOID(ACTIVATION);
    constexpr double linear = kLinear<ACTIVATION>, cubic = kCubic<ACTIVATION>;
    const double w = cubic == 0 ? u * linear : u * (linear + cubic * (u * u));
    return u / (1.0 + __builtin_exp(-w));
  }
}

template <int ACTIVATION>
FN_INLINE double pull_back(double u, double d) {
  if constexpr (ACTIVATION == kRelu) {
    return u <= 0 ? 0.0 : d;
  } else if constexpr (ACTIVATION == kGelu) {
    return d * (0.5 * __builtin_erfc(-u * 0.70710678118654752) + u * (__builtin_exp(-0.5 * u * u) * kDensity));
  } else {
    FN_HAS_SIGMOID(ACTIVATION);
    constexpr double linear = kLinear<ACTIVATION>, cubic = kCubic<ACTIVATION>;
    const double square = u * u > kFar ? kFar : u * u;
    const double w = cubic == 0 ? u * linear : u * (linear + cubic * square), growth = linear + 3 * cubic * square;
    const double e = __builtin_exp(-__builtin_fabs(w)), large = 1 / (1 + e), small = e * large;
    return d * (u < 0 ? small + (small * u) * (large * growth) : large + (large * u) * (small * growth));
  }
}

template <int ACTIVATION>
FN_INLINE Vec<float> activated(const Vec<float>& u) {
  Vec<float> r;
  FN_EACH(k) r.v[k] = activate<ACTIVATION>(u.v[k]);
  return r;
}
template <int ACTIVATION>
FN_INLINE Vec<double> activated(const Vec<double>& u) {
  double lanes[Vec<double>::kLanes];
  u.store(lanes);
  for (double& lane : lanes) lane = activate<ACTIVATION>(lane);
  return Vec<double>::load(lanes);
}

template <int ACTIVATION>
FN_INLINE Vec<float> pulled_back(const Vec<float>& u, const Vec<float>& d) {
  Vec<float> r;
  FN_EACH(k) r.v[k] = pull_back<ACTIVATION>(u.v[k], d.v[k]);
  return r;
}
template <int ACTIVATION>
FN_INLINE Vec<double> pulled_back(const Vec<double>& u, const Vec<double>& d) {
  double at[Vec<double>::kLanes], lanes[Vec<double>::kLanes];
  u.store(at);
  d.store(lanes);
  for (int i = 0; i < Vec<double>::kLanes; ++i) lanes[i] = pull_back<ACTIVATION>(at[i], lanes[i]);
  return Vec<double>::load(lanes);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
