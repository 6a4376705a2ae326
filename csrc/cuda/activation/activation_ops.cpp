// fusednorm_cuda::bias_act_dropout_fwd and _bwd: arguments checked, outputs allocated, a form chosen, kernels launched.
#include "../../common/norm_call.h"
#include "activation_launch.h"
#include "activation_table.h"
#include "../support/machine.h"
#include "../support/operands.h"
#include "../support/partials.h"

namespace fusednorm_cuda {

namespace {

// The rows' dtype.
Dtype describe_call(ActivationCommon& a, const Sizes& s, const BiasActCall& call) {
  const auto& [x, bias, seed, options, dropout_p] = call;
  const Dtype dtype = dtype_of("x", x);
  STD_TORCH_CHECK(s.ndim > 0, "x: expected one dimension at least");
  const int64_t columns = s.sizes[s.ndim - 1];
  STD_TORCH_CHECK(columns > 0 && columns < kMostColumns, "a row has no columns, or 2**30 and more");
  a.n_rows = product(s.sizes, s.ndim - 1);
  STD_TORCH_CHECK(a.n_rows > 0, "no rows");
  a.n_columns = int(columns);
  a.activation = activation_of(options);
  check_device("seed", seed, x);
  a.element = dropout("dropout_p", dropout_p);
  a.seed = a.element.on ? seed_of(seed) : nullptr;
  a.bias = parameter_of("bias", bias, x, columns, dtype);
  a.x = rows_of("x", x, x, s, s.ndim - 1, dtype);
  return dtype;
}

void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  const BiasActCall call = parse_bias_act(stack);
  const Handle& x = call.x;
  const Sizes s = sizes_of("x", x);
  ActivationForward a{};
  const Dtype dtype = describe_call(a, s, call);
  const int device = device_of(x), vector = int(16 / kItemSize[dtype]);
  const OnDevice guard(device);
  Handle y = empty(x, s.ndim, s.sizes, dtype);
  a.y = fresh_data(y);
  const bool fits = a.n_columns % vector == 0 && aligned(a.x) && aligned(a.bias) && aligned(a.y);
  const Limits limit = limits(device);
  const Form form = activation_form(a.n_columns, vector, fits, limit);
  const int programs = activation_programs(a.n_rows, form, dtype == kFloat64, limit);
  launch_activation(dtype, a, form, programs, current_cuda_stream(device));
  give(stack, y);
}

void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle dy = parse_tensor(stack[0]);
  const BiasActCall call = parse_bias_act(stack + 1);
  const Handle &x = call.x, &bias = call.bias;
  const Sizes s = sizes_of("x", x);
  ActivationBackward a{};
  const Dtype dtype = describe_call(a, s, call);
  a.dy = rows_of("dy", dy, x, s, s.ndim - 1, dtype);
  const bool wants_dx = call.options.wants_dx, wants_dbias = call.options.wants_dbias && bias, wide = dtype == kFloat64;
  const int device = device_of(x), vector = int(16 / kItemSize[dtype]);
  const OnDevice guard(device);
  const int64_t none[1] = {0}, columns[1] = {a.n_columns};
  Handle dx = wants_dx ? empty(x, s.ndim, s.sizes, dtype) : empty(x, 1, none, dtype);
  Handle dbias = empty(x, 1, wants_dbias ? columns : none, wants_dbias ? dtype_of("bias", bias) : dtype);
  a.dx = wants_dx ? fresh_data(dx) : nullptr;
  const bool fits =
      a.n_columns % vector == 0 && aligned(a.x) && aligned(a.dy) && aligned(a.bias) && aligned(a.dx);
  const Limits limit = limits(device);
  const Form form = activation_form(a.n_columns, vector, fits, limit);
  const int programs = activation_programs(a.n_rows, form, wide, limit);
  const int64_t partial_sizes[2] = {programs, a.n_columns};
  const Handle partials = wants_dbias ? empty(x, 2, partial_sizes, wide ? kFloat64 : kFloat32) : Handle();
  a.partials = partials ? fresh_data(partials) : nullptr;
  void* const cuda_stream = current_cuda_stream(device);
  launch_activation(dtype, a, form, programs, cuda_stream);
  if (wants_dbias)
    sum_partials({a.partials, programs, a.n_columns, {fresh_data(dbias)}, {dtype_of("bias", bias)}}, 1, wide, limit.early,
                 cuda_stream);
  give(stack, dx, dbias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cuda, m) {
  m.def(kBiasActDropoutFwd);
  m.def(kBiasActDropoutBwd);
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, FN_DISPATCH_KEY, m) {
  m.impl("bias_act_dropout_fwd", &forward_op);
  m.impl("bias_act_dropout_bwd", &backward_op);
}

}  // namespace fusednorm_cuda
