// The activations and their derivatives.
#pragma once

#include "activation_args.h"
#include "../support/values.cuh"

namespace fusednorm_cuda {

FN_DEVICE float exponential(float v) { return expf(v); }
FN_DEVICE double exponential(double v) { return exp(v); }
FN_DEVICE float error_function(float v) { return erff(v); }
FN_DEVICE double error_function(double v) { return erf(v); }

constexpr double kRootHalf = 0.70710678118654752440;
constexpr double kDensity = 0.39894228040143267794;  // of the normal distribution at 0
constexpr double kSaturated = 1000.0;  // past where a sigmoid(w) with a cube in w is 0 or 1 in every dtype; its cube is finite

// sigmoid(w) and its derivative, neither with a cancellation nor an overflow.
template <class C>
FN_DEVICE void sigmoid_and_slope(C w, C& sigmoid, C& slope) {
  const C small = exponential(w < 0 ? w : -w), larger = C(1) / (C(1) + small);
  sigmoid = w >= 0 ? larger : small * larger;
  slope = small * larger * larger;
}

// An activation and its derivative in the compute type: u sigmoid(w), w = u (kLinear + kCubic u^2).
template <class C, Activation ACTIVATION>
struct Function {
  static constexpr double kLinear = kActivations[ACTIVATION].linear, kCubic = kActivations[ACTIVATION].cubic;
  static_assert(kLinear > 0, "an activation that is not u sigmoid(w) needs a specialization of its own");

  FN_DEVICE static C value(C u) { return u / (C(1) + exponential(-u * (C(kLinear) + of_square(kCubic, u)))); }
  FN_DEVICE static C slope(C u) {
    C v = u;
    if constexpr (kCubic != 0) v = u > C(kSaturated) ? C(kSaturated) : u < C(-kSaturated) ? C(-kSaturated) : u;
    C sigmoid, slope;
    sigmoid_and_slope(v * (C(kLinear) + of_square(kCubic, v)), sigmoid, slope);
    return sigmoid + v * ((C(kLinear) + of_square(3 * kCubic, v)) * slope);  // so no finite v gives 0 times infinity
  }

 private:
  FN_DEVICE static C of_square(double factor, C u) {
    if constexpr (kCubic == 0) return C(0);
    return C(factor) * u * u;
  }
};

template <class C>
struct Function<C, kRelu> {
  FN_DEVICE static C value(C u) { return u <= 0 ? C(0) : u; }  // NaN stays NaN
  FN_DEVICE static C slope(C u) { return u <= 0 ? C(0) : C(1); }
};

template <class C>
struct Function<C, kGelu> {
  FN_DEVICE static C value(C u) { return C(0.5) * u * (C(1) + error_function(u * C(kRootHalf))); }
  FN_DEVICE static C slope(C u) {
    return C(0.5) * (C(1) + error_function(u * C(kRootHalf))) + u * (exponential(C(-0.5) * u * u) * C(kDensity));
  }
};

// step(function) with the one that is asked for: a branch that all threads take alike, not a kernel for each.
template <class C, class F>
FN_DEVICE void with_activation(Activation activation, const F& step) {
  switch (activation) {
#define FN_CASE(enumerator, ...) \
  case k##enumerator: return step(Function<C, k##enumerator>{});
    FN_ACTIVATIONS(FN_CASE)
#undef FN_CASE
  }
}

}  // namespace fusednorm_cuda
