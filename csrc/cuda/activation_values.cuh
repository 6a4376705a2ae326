// The activations and their derivatives.
#pragma once

#include "activation_args.h"
#include "values.cuh"

namespace fusednorm_cuda {

FN_DEVICE float exponential(float v) { return expf(v); }
FN_DEVICE double exponential(double v) { return exp(v); }
FN_DEVICE float error_function(float v) { return erff(v); }
FN_DEVICE double error_function(double v) { return erf(v); }

constexpr double kRootHalf = 0.70710678118654752440;
constexpr double kDensity = 0.39894228040143267794;  // of the normal distribution at 0
// gelu_tanh(u) = u sigmoid(w), w = u (kLinear + kCubic u^2): tanh(v) is 2 sigmoid(2 v) - 1
constexpr double kLinear = 1.59576912160573071176, kCubic = 0.044715 * kLinear;
constexpr double kSaturated = 1000.0;  // far beyond where the tanh of w is 1 in every dtype; its cube is finite

template <class C>
struct Relu {
  FN_DEVICE static C value(C u) { return u <= 0 ? C(0) : u; }  // NaN stays NaN
  FN_DEVICE static C slope(C u) { return u <= 0 ? C(0) : C(1); }
};

template <class C>
struct Gelu {
  FN_DEVICE static C value(C u) { return C(0.5) * u * (C(1) + error_function(u * C(kRootHalf))); }
  FN_DEVICE static C slope(C u) {
    return C(0.5) * (C(1) + error_function(u * C(kRootHalf))) + u * (exponential(C(-0.5) * u * u) * C(kDensity));
  }
};

// sigmoid(w) and its derivative, neither with a cancellation nor an overflow.
template <class C>
FN_DEVICE void sigmoid_and_slope(C w, C& sigmoid, C& slope) {
  const C small = exponential(w < 0 ? w : -w), larger = C(1) / (C(1) + small);
  sigmoid = w >= 0 ? larger : small * larger;
  slope = small * larger * larger;
}

template <class C>
struct GeluTanh {
  FN_DEVICE static C value(C u) { return u / (C(1) + exponential(-u * (C(kLinear) + C(kCubic) * u * u))); }
  FN_DEVICE static C slope(C u) {
    const C v = u > C(kSaturated) ? C(kSaturated) : u < C(-kSaturated) ? C(-kSaturated) : u;
    C sigmoid, slope;
    sigmoid_and_slope(v * (C(kLinear) + C(kCubic) * v * v), sigmoid, slope);
    return sigmoid + v * (C(kLinear) + C(3 * kCubic) * v * v) * slope;
  }
};

template <class C>
struct Silu {
  FN_DEVICE static C value(C u) { return u / (C(1) + exponential(-u)); }
  FN_DEVICE static C slope(C u) {
    C sigmoid, slope;
    sigmoid_and_slope(u, sigmoid, slope);
    return sigmoid + u * slope;
  }
};

// step(activation) with the one that is asked for: a branch that all threads take alike, not a kernel for each.
template <class C, class F>
FN_DEVICE void with_activation(Activation activation, const F& step) {
  switch (activation) {
    case kRelu: return step(Relu<C>{});
    case kGelu: return step(Gelu<C>{});
    case kGeluTanh: return step(GeluTanh<C>{});
    case kSilu: return step(Silu<C>{});
  }
}

}  // namespace fusednorm_cuda
