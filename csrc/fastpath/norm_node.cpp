#include "norm_node.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <mutex>

#include "node.h"
#include "plain.h"

namespace fusednorm_fastpath {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

fusednorm::Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return fusednorm::kFloat64;
    case at::kFloat: return fusednorm::kFloat32;
    case at::kBFloat16: return fusednorm::kBFloat16;
    default: return fusednorm::kFloat16;
  }
}

// `has_residual`: whether z is another tensor than x; weight, bias, x_bias: whether given.
struct SavedOptions {
  int64_t normalized_ndim;
  double eps, dropout_p;
  bool rms, by_cuda, has_residual, weight, bias, x_bias;

  std::array<bool, 6> switches() const { return {rms, by_cuda, has_residual, weight, bias, x_bias}; }
};

const fusednorm::Norms cpu = {fusednorm::kNormsAbi, fusednorm_cpu::run_forward, fusednorm_cpu::run_backward};
const fusednorm::Norms* cuda = nullptr;
bool cuda_is_emulated = false;
uint64_t cuda_devices = 0;

const fusednorm::Norms& library(bool by_cuda) { return by_cuda ? *cuda : cpu; }

// Rows and parameters as the CUDA library reads them. Of others Python makes copies.
bool as_cuda_reads(const at::Tensor& rows, const at::Tensor& like) {
  return !rows.defined() || (rows.is_contiguous() && rows.scalar_type() == like.scalar_type() && rows.device() == like.device());
}
bool as_cuda_reads_parameter(const at::Tensor& parameter, const at::Tensor& like) {
  if (!parameter.defined()) return true;
  const at::ScalarType compute = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return parameter.is_contiguous() && parameter.device() == like.device() &&
         (parameter.scalar_type() == like.scalar_type() || parameter.scalar_type() == compute);
}

// x and the residual have one dtype here.
fusednorm::Options native_options(const SavedOptions& options, at::ScalarType dtype, unsigned gradients) {
  const fusednorm::Dtype both = dtype_of(dtype);
  return {options.normalized_ndim, both, both, options.rms, false, options.has_residual, false, gradients};
}

struct Saved {
  at::Tensor z, stats, weight, bias, x_bias, seed;
};

using OutputMask = std::array<bool, 5>;  // gradients: of x, residual, weight, bias, x_bias
using Gradients = std::array<at::Tensor, 5>;

// Second derivatives, batched cotangents, tensors of other kinds, a norm that was not used: by autograd/norm.py.
Gradients gradients_in_python(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dnormed,
                              const at::Tensor& dz, const Saved& saved) {
  pybind11::gil_scoped_acquire gil;
  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
  };
  const pybind11::object backward = pybind11::module_::import("fusednorm.autograd.norm").attr("fastpath_backward");
  const pybind11::tuple found =
      backward(optional(dnormed), optional(dz), saved.z, saved.stats, optional(saved.weight), optional(saved.bias),
               optional(saved.x_bias), optional(saved.seed), options.normalized_ndim, options.eps, options.dropout_p,
               options.rms, output_mask, options.by_cuda ? "cuda" : "cpu");
  Gradients gradients;
  for (size_t i = 0; i < gradients.size(); ++i)
    if (!pybind11::object(found[i]).is_none()) gradients[i] = pybind11::cast<at::Tensor>(found[i]);
  return gradients;
}

bool library_takes(const SavedOptions& options, const at::Tensor& dnormed, const at::Tensor& dz, const Saved& saved) {
  const c10::DispatchKey key = device_key(options.by_cuda);
  for (const at::Tensor* tensor : {&dnormed, &dz, &saved.z, &saved.stats, &saved.weight, &saved.bias, &saved.x_bias,
                                   &saved.seed})
    if (!plain(*tensor, key)) return false;
  if (!options.by_cuda) return true;
  for (const at::Tensor* rows : {&dnormed, &dz, &saved.z})
    if (!as_cuda_reads(*rows, saved.z)) return false;
  for (const at::Tensor* parameter : {&saved.weight, &saved.bias, &saved.x_bias})
    if (!as_cuda_reads_parameter(*parameter, saved.z)) return false;
  return true;
}

Gradients gradients_natively(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dnormed,
                             const at::Tensor& dz, const Saved& saved) {
  RECORD_FUNCTION(options.by_cuda ? "fusednorm_cuda::add_layer_norm_bwd" : "fusednorm_cpu::add_layer_norm_bwd",
                  c10::ArrayRef<const c10::IValue>{});
  unsigned bits = 0;
  for (size_t i = 0; i < output_mask.size(); ++i) bits |= unsigned(output_mask[i]) << i;
  fusednorm::Gradients found = library(options.by_cuda).backward(
      // hooks on saved tensors may bring the statistics back with other strides
      {handle(dnormed), handle(dz), handle(saved.z), handle(saved.stats.contiguous()), handle(saved.weight), handle(saved.bias),
       {}, handle(saved.x_bias), {}, handle(saved.seed), native_options(options, saved.z.scalar_type(), bits),
       options.dropout_p, 0.0});
  Gradients gradients;
  for (size_t i = 0; i < gradients.size(); ++i) gradients[i] = take(found.of[i]);
  return gradients;
}

variable_list gradients(const SavedOptions& options, const OutputMask& output_mask, const variable_list& cotangents,
                        const Saved& saved) {
  const at::Tensor dnormed = cotangents[0], dz = cotangents.size() > 1 ? cotangents[1] : at::Tensor();
  const bool shared = !(options.dropout_p > 0);  // x and residual have the same gradient: it is computed once
  const OutputMask asked{output_mask[0] || (shared && output_mask[1]), output_mask[1] && !shared, output_mask[2],
                         output_mask[3], output_mask[4]};
  Gradients found{dz};
  if (dnormed.defined() || options.x_bias || !shared) {
    const bool native = dnormed.defined() && !at::GradMode::is_enabled() && plain_thread() &&
                        library_takes(options, dnormed, dz, saved);
    found = (native ? gradients_natively : gradients_in_python)(options, asked, dnormed, dz, saved);
  }
  if (shared && output_mask[1]) found[1] = found[0];
  if (!output_mask[0]) found[0] = at::Tensor();
  return {found.begin(), found.end()};
}

// It saves what AddLayerNormFunction saves.
struct NormBackward : public Node {
  SavedVariable z, stats, weight, bias, x_bias, seed;
  SavedOptions options;

  std::string name() const override { return "FusedNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : all()) variable->reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return gradients(options, output_mask(), cotangents, saved());
  }

  std::array<SavedVariable*, 6> all() { return {&z, &stats, &weight, &bias, &x_bias, &seed}; }

  OutputMask output_mask() const {
    OutputMask found;  // an input that was not given has an edge to nowhere
    for (size_t i = 0; i < found.size(); ++i) found[i] = task_should_compute_output(i);
    return found;
  }

  Saved saved() {
    const NodePointer self = pointer_to(this);
    return {options.has_residual ? z.unpack(self) : z.unpack(), stats.unpack(),
            options.weight ? weight.unpack() : at::Tensor(), options.bias ? bias.unpack() : at::Tensor(),
            options.x_bias ? x_bias.unpack() : at::Tensor(), options.dropout_p > 0 ? seed.unpack() : at::Tensor()};
  }

  // --- compiled autograd: what the node depends on, and the same computation as a function that it can trace ---

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(z, options.has_residual);
    for (const SavedVariable* variable : {&stats, &weight, &bias, &x_bias, &seed}) args.collect(*variable, false);
    args.collect(options.normalized_ndim);
    args.collect(options.eps);
    args.collect(options.dropout_p);
    for (const bool flag : options.switches()) args.collect(flag);
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* variable : all()) swap.before(*variable);
    const Saved k = saved();
    variable_list tensors;
    for (const at::Tensor& tensor : {k.z, k.stats, k.weight, k.bias, k.x_bias, k.seed})
      if (tensor.defined()) tensors.push_back(tensor);
    PackedArgs packed;
    packed.pack(tensors);
    packed.pack(output_mask());
    packed.pack(options.switches());
    packed.pack(options.normalized_ndim);
    packed.pack(options.eps);
    packed.pack(options.dropout_p);
    variable_list found = apply_traced(*this, traced, packed, cotangents, swap);
    for (SavedVariable* variable : all()) swap.after(*variable);
    return found;
  }

  static variable_list traced(const variable_list& cotangents, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    variable_list tensors = packed.unpack<variable_list>();
    const auto output_mask = packed.unpack<OutputMask>();
    const auto on = packed.unpack<std::array<bool, 6>>();
    const auto normalized_ndim = packed.unpack<int64_t>();
    const auto eps = packed.unpack<double>();
    const SavedOptions options{normalized_ndim, eps, packed.unpack<double>(), on[0], on[1], on[2], on[3], on[4], on[5]};
    size_t next = 2;
    const auto one = [&](bool is_there) { return is_there ? tensors[next++] : at::Tensor(); };
    Saved saved{tensors[0], tensors[1], one(options.weight), one(options.bias), one(options.x_bias),
                one(options.dropout_p > 0)};
    return gradients(options, output_mask, cotangents, saved);
  }
};

}  // namespace

void attach_cuda(const fusednorm::Norms* norms, bool emulated, uint64_t devices) {
  TORCH_CHECK(norms->abi == fusednorm::kNormsAbi, "the fast path and libfusednorm_cuda.so are of different builds");
  cuda = norms;
  cuda_is_emulated = emulated;
  cuda_devices = devices;
}

c10::DispatchKey device_key(bool by_cuda) {
  return by_cuda && !cuda_is_emulated ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
}

bool cuda_takes(const NormCall& call) {
  constexpr int64_t kMostColumns = int64_t(1) << 30;
  if (!cuda || !call.x.numel()) return false;
  const auto device = uint64_t(cuda_is_emulated ? 0 : call.x.get_device());
  if (device >= 64 || !(cuda_devices >> device & 1)) return false;
  if (c10::multiply_integers(call.x.sizes().slice(call.x.dim() - call.normalized_ndim)) >= kMostColumns) return false;
  if (call.dropout_p > 0 && call.normalized_ndim > 1) return false;
  if (!as_cuda_reads(call.x, call.x) || !as_cuda_reads(call.residual, call.x)) return false;
  if (call.seed.defined() && call.seed.device() != call.x.device()) return false;
  return as_cuda_reads_parameter(call.weight, call.x) && as_cuda_reads_parameter(call.bias, call.x) &&
         as_cuda_reads_parameter(call.x_bias, call.x);
}

NormResult norm(const NormCall& call) {
  const SavedOptions options{call.normalized_ndim, call.eps,           call.dropout_p,         call.rms,
                    call.by_cuda,         call.has_residual(), call.weight.defined(), call.bias.defined(),
                    call.x_bias.defined()};
  NormResult result;
  fusednorm::Outputs out;
  {
    RECORD_FUNCTION(call.by_cuda ? "fusednorm_cuda::add_layer_norm_fwd" : "fusednorm_cpu::add_layer_norm_fwd",
                    c10::ArrayRef<const c10::IValue>{});
    out = library(call.by_cuda).forward(
        {handle(call.x), handle(call.residual), handle(call.weight), handle(call.bias), handle(call.x_bias), {},
         handle(call.seed), native_options(options, call.x.scalar_type(), 0), call.eps, call.dropout_p, 0.0},
        call.needs_grad);
  }
  result.normed = take(out.normed);
  if (options.has_residual) result.z = take(out.z);
  if (!call.needs_grad) return result;
  const NodePointer pointer = make_node<NormBackward>();
  auto& node = static_cast<NormBackward&>(*pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(call.x, call.residual, call.weight, call.bias, call.x_bias));
  torch::autograd::set_history(result.normed, pointer);
  if (options.has_residual) torch::autograd::set_history(result.z, pointer);
  node.options = options;
  node.z = options.has_residual ? SavedVariable(result.z, true) : SavedVariable(call.x, false);
  node.stats = SavedVariable(take(out.stats), false);
  if (options.weight) node.weight = SavedVariable(call.weight, false);
  if (options.bias) node.bias = SavedVariable(call.bias, false);
  if (options.x_bias) node.x_bias = SavedVariable(call.x_bias, false);
  if (options.dropout_p > 0) node.seed = SavedVariable(call.seed, false);
  return result;
}

}  // namespace fusednorm_fastpath
