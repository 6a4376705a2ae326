#include "norm_node.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include "cuda_library.h"
#include "node.h"

namespace fusednorm_fastpath {

namespace {

fusednorm::Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return fusednorm::kFloat64;
    case at::kFloat: return fusednorm::kFloat32;
    case at::kBFloat16: return fusednorm::kBFloat16;
    default: return fusednorm::kFloat16;
  }
}

const fusednorm::Norms cpu = {fusednorm::kNormsAbi, fusednorm_cpu::run_forward, fusednorm_cpu::run_backward};

const fusednorm::Norms& library(bool by_cuda) { return by_cuda ? *cuda.norms : cpu; }

// Rows and parameters as the CUDA library reads them. Of others Python makes copies.
bool as_cuda_reads(const at::Tensor& rows, const at::Tensor& like) {
  return !rows.defined() || (rows.is_contiguous() && rows.scalar_type() == like.scalar_type() && rows.device() == like.device());
}
bool as_cuda_reads_parameter(const at::Tensor& parameter, const at::Tensor& like, int64_t normalized_ndim) {
  if (!parameter.defined()) return true;
  constexpr int64_t kMostStride = int64_t(1) << 31;  // from one sample's vector to the next one's
  const bool of_samples = parameter.dim() > normalized_ndim;
  int64_t step = 1;
  for (int64_t d = parameter.dim() - 1; d >= parameter.dim() - normalized_ndim; step *= parameter.size(d--))
    if (parameter.size(d) != 1 && parameter.stride(d) != step) return false;
  if (of_samples && parameter.stride(0) >= kMostStride) return false;
  const at::ScalarType compute = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return parameter.device() == like.device() &&
         (parameter.scalar_type() == like.scalar_type() || parameter.scalar_type() == compute);
}

// x and the residual have one dtype here.
fusednorm::Options library_options(const NormOptions& options, at::ScalarType dtype, bool store_residual,
                                   unsigned gradients) {
  const fusednorm::Dtype both = dtype_of(dtype);
  return {options.normalized_ndim, both, both, options.rms, options.zero_centered, store_residual, false, gradients};
}

struct Norm {
  static constexpr char kName[] = "FusedNormBackward", kModule[] = "fusednorm.autograd.norm";
  static constexpr size_t kInputs = 6;  // x, residual, weight, bias, x_bias, layer_scale
  static constexpr size_t kSaved = 8;   // z, stats, weight, bias, x, x_bias, layer_scale, seed
  using Options = NormOptions;

  template <class O, class F>
  static void each(O& o, const F& f) {
    f(o.normalized_ndim), f(o.eps), f(o.dropout_p), f(o.rms), f(o.zero_centered), f(o.by_cuda);
  }

  static pybind11::tuple python_options(const Options& o, const Wanted<Norm>& wanted) {
    return pybind11::make_tuple(o.normalized_ndim, o.eps, o.dropout_p, o.rms, o.zero_centered, wanted,
                                 o.by_cuda ? "cuda" : "cpu");
  }

  static variable_list gradients(const Options& options, const Wanted<Norm>& wanted, const variable_list& cotangents,
                                 const Saved<Norm>& saved) {
    const at::Tensor dnormed = cotangents[0], dz = cotangents.size() > 1 ? cotangents[1] : at::Tensor();
    const at::Tensor &x_bias = saved[5], &layer_scale = saved[6];
    const bool shared = !(options.dropout_p > 0) && !layer_scale.defined();  // x and residual have the same gradient: it is computed once
    const Wanted<Norm> asked{wanted[0] || (shared && wanted[1]), wanted[1] && !shared, wanted[2], wanted[3], wanted[4], wanted[5]};
    variable_list found(kInputs);
    if (dnormed.defined() && library_takes(options, cotangents, saved))
      found = gradients_natively(options, asked, dnormed, dz, saved);
    else if (dnormed.defined() || x_bias.defined() || !shared)
      found = gradients_in_python<Norm>(options, asked, {dnormed, dz}, saved);
    else
      found[0] = dz;
    if (shared && wanted[1]) found[1] = found[0];
    if (!wanted[0]) found[0] = at::Tensor();
    return found;
  }

  static bool library_takes(const Options& options, const variable_list& cotangents, const Saved<Norm>& saved) {
    if (!plain_backward<Norm>(cotangents, saved, device_key(options.by_cuda))) return false;
    if (!options.by_cuda) return true;
    const auto& [z, stats, weight, bias, x, x_bias, layer_scale, seed] = saved;
    for (const at::Tensor& rows : cotangents)
      if (!as_cuda_reads(rows, z)) return false;
    const auto reads = [&, n = options.normalized_ndim](const at::Tensor& p) { return as_cuda_reads_parameter(p, z, n); };
    return as_cuda_reads(z, z) && as_cuda_reads(x, z) && reads(weight) && reads(bias) && reads(x_bias) && reads(layer_scale);
  }

  static variable_list gradients_natively(const Options& options, const Wanted<Norm>& wanted, const at::Tensor& dnormed,
                                          const at::Tensor& dz, const Saved<Norm>& saved) {
    const auto& [z, stats, weight, bias, x, x_bias, layer_scale, seed] = saved;
    RECORD_FUNCTION(options.by_cuda ? "fusednorm_cuda::add_layer_norm_bwd" : "fusednorm_cpu::add_layer_norm_bwd",
                    c10::ArrayRef<const c10::IValue>{});
    unsigned bits = 0;
    for (size_t i = 0; i < kInputs; ++i) bits |= unsigned(wanted[i]) << i;
    fusednorm::Gradients found = library(options.by_cuda).backward(
        // hooks on saved tensors may bring the statistics back with other strides
        {handle(dnormed), handle(dz), handle(z), handle(stats.contiguous()), handle(weight), handle(bias), handle(x),
         handle(x_bias), handle(layer_scale), handle(seed), library_options(options, z.scalar_type(), false, bits), options.dropout_p,
         0.0});
    variable_list gradients(kInputs);
    for (size_t i = 0; i < kInputs; ++i) gradients[i] = take(found.of[i]);
    return gradients;
  }
};

}  // namespace

bool cuda_takes(const NormCall& call) {
  constexpr int64_t kMostColumns = int64_t(1) << 30;
  if (!call.x.numel() || !cuda.runs_on(call.x)) return false;
  if (c10::multiply_integers(call.x.sizes().slice(call.x.dim() - call.normalized_ndim)) >= kMostColumns) return false;
  if (call.dropout_p > 0 && call.normalized_ndim > 1) return false;
  if (!as_cuda_reads(call.x, call.x) || !as_cuda_reads(call.residual, call.x)) return false;
  if (call.seed.defined() && call.seed.device() != call.x.device()) return false;
  const auto reads = [&, n = call.normalized_ndim](const at::Tensor& p) { return as_cuda_reads_parameter(p, call.x, n); };
  return reads(call.weight) && reads(call.bias) && reads(call.x_bias) && reads(call.layer_scale);
}

NormResult norm(const NormCall& call) {
  const bool has_residual = call.has_residual();
  NormResult result;
  fusednorm::Outputs out;
  {
    RECORD_FUNCTION(call.by_cuda ? "fusednorm_cuda::add_layer_norm_fwd" : "fusednorm_cpu::add_layer_norm_fwd",
                    c10::ArrayRef<const c10::IValue>{});
    out = library(call.by_cuda).forward(
        {handle(call.x), handle(call.residual), handle(call.weight), handle(call.bias), handle(call.x_bias),
         handle(call.layer_scale), handle(call.seed), library_options(call, call.x.scalar_type(), has_residual, 0), call.eps, call.dropout_p,
         0.0},
        call.needs_grad);
  }
  result.normed = take(out.normed);
  if (has_residual) result.z = take(out.z);
  if (!call.needs_grad) return result;
  const at::Tensor stats = take(out.stats), none;
  const at::Tensor& x = call.layer_scale.defined() && call.layer_scale.requires_grad() ? call.x : none;
  record<Norm>(call, {&result.normed, &result.z},
               {has_residual ? &result.z : &call.x, &stats, &call.weight, &call.bias, &x, &call.x_bias, &call.layer_scale,
                &call.seed},
               has_residual ? 0 : -1, call.x, call.residual, call.weight, call.bias, call.x_bias, call.layer_scale);
  return result;
}

NormResult norm_by_torch(const NormCall& call) {
  const at::IntArrayRef shape = call.x.sizes().slice(call.x.dim() - call.normalized_ndim);
  const at::Tensor sum = call.residual.defined() ? at::add(call.residual, call.x) : at::Tensor();
  const at::Tensor& z = sum.defined() ? sum : call.x;
  const auto given = [](const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; };
  if (call.rms) return {at::rms_norm(z, shape, given(call.weight), call.eps), sum};
  return {at::layer_norm(z, shape, given(call.weight), given(call.bias), call.eps), sum};
}

}  // namespace fusednorm_fastpath
