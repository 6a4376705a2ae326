#include "activation_node.h"

#include <ATen/ops/add.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/record_function.h>

#include "node.h"

namespace fusednorm_fastpath {

namespace {

struct BiasAct {
  static constexpr char kName[] = "FusedBiasActBackward", kModule[] = "fusednorm.autograd.activation";
  static constexpr size_t kInputs = 2, kSaved = 3;  // x, bias; x, bias, seed
  using Options = BiasActOptions;

  template <class O, class F>
  static void each(O& o, const F& f) {
    f(o.activation), f(o.dropout_p);
  }

  static pybind11::tuple python_options(const Options& o, const Wanted<BiasAct>& wanted) {
    return pybind11::make_tuple(o.activation, o.dropout_p, wanted);
  }

  static variable_list gradients(const Options& options, const Wanted<BiasAct>& wanted, const variable_list& cotangents,
                                 const Saved<BiasAct>& saved) {
    if (!cotangents[0].defined()) return variable_list(2);
    if (!plain_backward<BiasAct>(cotangents, saved))
      return gradients_in_python<BiasAct>(options, wanted, cotangents, saved);
    const auto& [x, bias, seed] = saved;
    RECORD_FUNCTION("fusednorm_cpu::bias_act_dropout_bwd", c10::ArrayRef<const c10::IValue>{});
    auto found = fusednorm_cpu::run_activation_backward(
        handle(cotangents[0]),
        {handle(x), handle(bias), handle(seed), {options.activation, wanted[0], wanted[1]}, options.dropout_p});
    return {take(found.dx), take(found.dbias)};
  }
};

}  // namespace

at::Tensor bias_act_dropout(const BiasActCall& call) {
  at::Tensor y;
  {
    RECORD_FUNCTION("fusednorm_cpu::bias_act_dropout_fwd", c10::ArrayRef<const c10::IValue>{});
    fusednorm::Handle found = fusednorm_cpu::run_activation_forward(
        {handle(call.x), handle(call.bias), handle(call.seed), {call.activation, false, false}, call.dropout_p});
    y = take(found);
  }
  if (call.needs_grad) record<BiasAct>(call, {&y}, {&call.x, &call.bias, &call.seed}, -1, call.x, call.bias);
  return y;
}

at::Tensor bias_act_by_torch(const BiasActCall& call) {
  const at::Tensor u = call.bias.defined() ? at::add(call.x, call.bias) : call.x;
  switch (fusednorm::Activation(call.activation)) {
    case fusednorm::kRelu: return at::relu(u);
    case fusednorm::kGelu: return at::gelu(u, "none");
    case fusednorm::kGeluTanh: return at::gelu(u, "tanh");
    case fusednorm::kSilu: return at::silu(u);
    case fusednorm::kQuickGelu: return at::mul(u, at::sigmoid(at::mul(u, 1.702)));
  }
  TORCH_CHECK(false, "no activation has the number ", call.activation);
}

}  // namespace fusednorm_fastpath
