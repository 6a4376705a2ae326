// The operators' schemas and arguments, which both libraries have in common.
//
// All switches travel in one integer, `options`: a dispatched argument costs 30 to 60 ns, and a call on 4 x 64 elements
// has to stay within two microseconds of torch's own.
#pragma once

#include <algorithm>

#include "activations.h"
#include "handles.h"

namespace fusednorm {

constexpr char kAddLayerNormFwd[] =
    "add_layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? x_bias, "
    "Tensor? layer_scale, Tensor? seed, int options, float eps, float dropout_p, float drop_path_p) "
    "-> (Tensor normed, Tensor residual_out, Tensor stats)";
constexpr char kAddLayerNormBwd[] =
    "add_layer_norm_bwd(Tensor dnormed, Tensor? dresidual_out, Tensor saved, Tensor stats, Tensor? weight, "
    "Tensor? bias, Tensor? x, Tensor? x_bias, Tensor? layer_scale, Tensor? seed, int options, float dropout_p, "
    "float drop_path_p) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias, "
    "Tensor dlayer_scale)";

constexpr char kBiasActDropoutFwd[] =
    "bias_act_dropout_fwd(Tensor x, Tensor? bias, Tensor? seed, int options, float dropout_p) -> Tensor";
constexpr char kBiasActDropoutBwd[] =
    "bias_act_dropout_bwd(Tensor dy, Tensor x, Tensor? bias, Tensor? seed, int options, float dropout_p) "
    "-> (Tensor dx, Tensor dbias)";

struct Options {
  int64_t normalized_ndim;
  Dtype dtype, residual_dtype;  // of normed, or of dx; of the residual
  bool rms, zero_centered, store_residual, saved_is_normed;
  unsigned output_mask;
};

// As fusednorm/providers/native.py packs them: switches first, and above them what counts, which so has no bound.
inline Options unpack_options(int64_t bits) {
  const auto is_on = [&](int bit) { return bool(bits >> bit & 1); };
  return {bits >> 14, Dtype(bits & 3), Dtype(bits >> 2 & 3), is_on(4), is_on(5), is_on(6), is_on(7),
          unsigned(bits >> 8 & 63)};
}

struct ActivationOptions {
  int64_t activation;
  bool wants_dx, wants_dbias;  // of the backward
};

inline ActivationOptions unpack_activation_options(int64_t bits) {
  return {bits >> kActivationShift, bool(bits & 1), bool(bits >> 1 & 1)};
}

// The dimensions of rows.
inline int64_t leading_dims(const Sizes& s, const Options& o) {
  STD_TORCH_CHECK(o.normalized_ndim >= 1 && o.normalized_ndim <= s.ndim, "options: expected a normalized_ndim from 1 to ", s.ndim,
                  ", got ", o.normalized_ndim);
  return s.ndim - o.normalized_ndim;
}

inline Activation activation_of(const ActivationOptions& o) {
  STD_TORCH_CHECK(o.activation >= 0 && o.activation < kActivationCount, "options: expected an activation from 0 to ",
                  kActivationCount - 1, ", got ", o.activation);
  return Activation(o.activation);
}

struct ForwardCall {
  Handle x, residual, weight, bias, x_bias, layer_scale, seed;
  Options options;
  double eps, dropout_p, drop_path_p;
};

struct BackwardCall {
  Handle dnormed, dresidual_out, saved, stats, weight, bias, x, x_bias, layer_scale, seed;
  Options options;
  double dropout_p, drop_path_p;
};

struct BiasActCall {
  Handle x, bias, seed;
  ActivationOptions options;
  double dropout_p;
};

struct Outputs {
  Handle normed, z, stats;
};

struct Gradients {
  Handle of[6];  // x, residual, weight, bias, x_bias, layer_scale; undefined where not wanted
};

// What a library that the fast path is not linked to offers it. Both sides must have compiled `abi` alike.
struct Norms {
  int64_t abi;
  Outputs (*forward)(const ForwardCall& call, bool keep_statistics);
  Gradients (*backward)(const BackwardCall& call);
};
constexpr int64_t kNormsAbi = ((int64_t(sizeof(ForwardCall)) * 4096 + sizeof(BackwardCall)) * 4096 + sizeof(Outputs)) * 4096 +
                                 sizeof(Gradients);

// In the braces they are taken in this order.
inline ForwardCall parse_forward(StableIValue* stack) {
  using torch::stable::detail::to;
  return {parse_tensor(stack[0]),      parse_optional(stack[1]),       parse_optional(stack[2]),
          parse_optional(stack[3]),    parse_optional(stack[4]),       parse_optional(stack[5]),
          parse_optional(stack[6]),    unpack_options(to<int64_t>(stack[7])),
          to<double>(stack[8]),       to<double>(stack[9]),          to<double>(stack[10])};
}

inline BackwardCall parse_backward(StableIValue* stack) {
  using torch::stable::detail::to;
  return {parse_tensor(stack[0]),   parse_optional(stack[1]), parse_tensor(stack[2]),    parse_tensor(stack[3]),
          parse_optional(stack[4]), parse_optional(stack[5]), parse_optional(stack[6]),  parse_optional(stack[7]),
          parse_optional(stack[8]), parse_optional(stack[9]), unpack_options(to<int64_t>(stack[10])),
          to<double>(stack[11]),   to<double>(stack[12])};
}

// The arguments of bias_act_dropout; those of its backward stand behind dy.
inline BiasActCall parse_bias_act(StableIValue* stack) {
  using torch::stable::detail::to;
  return {parse_tensor(stack[0]), parse_optional(stack[1]), parse_optional(stack[2]),
          unpack_activation_options(to<int64_t>(stack[3])), to<double>(stack[4])};
}

// Results to the dispatcher's stack, in the schema's order.
template <class... Handles>
void give(StableIValue* stack, Handles&... results) {
  ((*stack++ = torch::stable::detail::from(results.release())), ...);
}

// Rows under one index of dimension 0, where `lead` dimensions make the rows.
inline int64_t rows_per_sample(const Sizes& s, int64_t lead) {
  return lead ? std::max<int64_t>(product(s.sizes + 1, lead - 1), 1) : 1;
}

inline Dropout dropout(const char* name, double p) {
  STD_TORCH_CHECK(p >= 0 && p < 1, name, ": expected a probability in [0, 1), got ", p);
  return {p > 0, uint32_t(int64_t(p * 4294967296.0)), p > 0 ? float(1.0 / (1.0 - p)) : 1.0f};
}

}  // namespace fusednorm
