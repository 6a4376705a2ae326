// The Python module: arguments taken from the call as they are, or None for a call that it leaves to Python.
#include <Python.h>

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cmath>

#include "../cpu/support/abi.h"
#include "activation_node.h"
#include "attention_node.h"
#include "cuda_library.h"
#include "norm_node.h"
#include "parse.h"
#include "plain.h"
#include "rules.h"

namespace fusednorm_fastpath {

namespace {

Rule fastpath_serves;  // of fusednorm.dispatch.rules

// Whether a call is for the CUDA library: `asked` is "cuda", or True, to choose, beside a tensor on a GPU. False is the CPU
// library.
bool for_cuda(PyObject* x, PyObject* asked) {
  return PyUnicode_Check(asked) || (asked == Py_True && THPVariable_CheckExact(x) && THPVariable_Unpack(x).is_cuda());
}

// Whether automatic choice leaves a call to the library that the fast path leads to.
bool is_chosen(const char* operation, const at::Tensor& x, int64_t columns, bool needs_grad) {
  const long long gpu = x.is_cuda() ? x.get_device() : -1, elements = x.numel();
  // an operation is one of few literals
  return fastpath_serves({int64_t(operation), int64_t(x.scalar_type()), elements, columns, 2 * gpu + needs_grad}, "sOLLOL",
                         operation, (PyObject*)torch::getTHPDtype(x.scalar_type()), elements, (long long)columns,
                         needs_grad ? Py_True : Py_False, gpu);
}

// Whether a modulation is one vector for each sample, as fusednorm/providers/samples.py has it.
bool of_samples(const at::Tensor& modulation, at::IntArrayRef sizes, int64_t normalized_ndim) {
  const int64_t lead = int64_t(sizes.size()) - normalized_ndim, ahead = modulation.dim() - normalized_ndim;
  if (ahead < 1 || ahead > lead || modulation.sizes().slice(ahead) != sizes.slice(lead)) return false;
  for (int64_t d = 0; d < ahead; ++d)
    if (modulation.size(d) != (d ? 1 : sizes[0])) return false;
  return true;
}

// The call's parameters from gate, scale and shift, where these are all that would be folded into one.
bool parse_modulation(PyObject* gate, PyObject* scale, PyObject* shift, NormCall& call) {
  const auto take = [&](PyObject* object, at::Tensor& parameter) {
    if (object == Py_None) return true;
    if (parameter.defined() || !parse_tensor(object, parameter, device_key(call.by_cuda))) return false;
    return of_samples(parameter, call.x.sizes(), call.normalized_ndim);
  };
  call.zero_centered = scale != Py_None;
  return take(gate, call.layer_scale) && take(scale, call.weight) && take(shift, call.bias);
}

// False where the call is not for the fast path. x, and what is not of a bare norm, is in `call` already.
bool parse_call(PyObject* residual, PyObject* shape, PyObject* weight, PyObject* bias, PyObject* eps, const char* operation,
               PyObject* asked, NormCall& call, PyObject* const* modulation = nullptr) {
  if (at::impl::torch_function_mode_enabled()) return false;
  const c10::DispatchKey device = device_key(call.by_cuda);
  if (!parse_tensor(residual, call.residual, device) || !parse_tensor(weight, call.weight, device) ||
      !parse_tensor(bias, call.bias, device))
    return false;
  const at::IntArrayRef sizes = call.x.sizes();
  if (!parse_shape(shape, sizes, call.normalized_ndim)) return false;
  const at::IntArrayRef normalized = sizes.slice(sizes.size() - call.normalized_ndim);
  const bool wide = call.x.scalar_type() == at::kDouble;
  if (!parse_eps(eps, call.rms, wide, call.eps)) return false;
  if (call.residual.defined() && (call.residual.scalar_type() != call.x.scalar_type() || call.residual.sizes() != sizes))
    return false;
  for (const at::Tensor* parameter : {&call.weight, &call.bias, &call.x_bias, &call.layer_scale})
    if (parameter->defined() && parameter->sizes() != normalized) return false;
  if (modulation && !parse_modulation(modulation[0], modulation[1], modulation[2], call)) return false;
  call.needs_grad = false;
  if (at::GradMode::is_enabled())
    for (const at::Tensor* tensor : {&call.x, &call.residual, &call.weight, &call.bias, &call.x_bias, &call.layer_scale})
      call.needs_grad |= tensor->defined() && tensor->requires_grad();
  if (call.by_cuda && !cuda_takes(call)) return false;
  if (asked != Py_True) return true;
  const int64_t columns = fusednorm::product(normalized.data(), int64_t(normalized.size()));
  const auto fits = [&](const at::Tensor& t) { return !t.defined() || t.scalar_type() == call.x.scalar_type(); };
  const bool one_dtype = fits(call.weight) && fits(call.bias);
  const bool plain = !call.has_epilogue() && !modulation;
  if (!call.by_cuda && !call.rms && !call.has_residual() && !modulation && !one_dtype) return false;  // not measured
  const bool chosen = is_chosen(operation, call.x, columns, call.needs_grad || call.dropout_p > 0);  // as rules.preference
  call.by_torch = !chosen && !call.by_cuda && one_dtype && plain;
  return chosen || call.by_torch;
}

// The library that is asked for, and x; false where the call is not for the fast path.
bool parse_first(PyObject* x, PyObject* asked, NormCall& call) {
  if (x == Py_None || !plain_thread()) return false;
  call.by_cuda = for_cuda(x, asked);
  return parse_tensor(x, call.x, device_key(call.by_cuda));
}

NormResult run(NormCall& call) {
  pybind11::gil_scoped_release no_gil;
  draw_where_none(call.dropout_p, call.x, call.seed);
  return call.by_torch ? norm_by_torch(call) : norm(call);
}

PyObject* rms_norm(PyObject* const* args) {
  NormCall call{};
  call.rms = true;
  if (!parse_first(args[0], args[4], call)) Py_RETURN_NONE;
  if (!parse_call(Py_None, args[1], args[2], Py_None, args[3], "rms_norm", args[4], call)) Py_RETURN_NONE;
  return THPVariable_Wrap(run(call).normed);
}

PyObject* add_norm(PyObject* const* args) {
  NormCall call{};
  call.rms = args[13] == Py_True;
  if (!parse_first(args[0], args[14], call)) Py_RETURN_NONE;
  const c10::DispatchKey device = device_key(call.by_cuda);
  if (!parse_tensor(args[6], call.x_bias, device) || !parse_tensor(args[7], call.layer_scale, device)) Py_RETURN_NONE;
  if (!parse_dropout(args[11], args[12], call.x, call.dropout_p, call.seed)) Py_RETURN_NONE;
  const char* const operations[] = {"layer_norm",     "rms_norm",     "add_layer_norm", "add_rms_norm",
                                    "bias_dropout_add_layer_norm", "bias_dropout_add_rms_norm",
                                    "adaptive_layer_norm", "adaptive_rms_norm"};
  const bool adaptive = args[8] != Py_None || args[9] != Py_None || args[10] != Py_None;
  const int kind = adaptive ? 3 : call.has_epilogue() ? 2 : args[1] != Py_None;
  const char* const operation = operations[2 * kind + call.rms];
  if (!parse_call(args[1], args[2], args[3], args[4], args[5], operation, args[14], call, adaptive ? args + 8 : nullptr))
    Py_RETURN_NONE;
  NormResult result = run(call);
  THPObjectPtr normed(THPVariable_Wrap(result.normed)), pair(PyTuple_New(2));
  if (!normed || !pair) throw python_error();
  PyTuple_SET_ITEM(pair.get(), 0, normed.release());
  PyTuple_SET_ITEM(pair.get(), 1, result.z.defined() ? THPVariable_Wrap(result.z) : Py_NewRef(args[0]));
  return pair.release();
}

// The number of an activation's name, -1 of no name.
int64_t activation_of(PyObject* name) {
  if (PyUnicode_CheckExact(name))
    for (int64_t i = 0; i < fusednorm::kActivationCount; ++i)
      if (PyUnicode_CompareWithASCIIString(name, fusednorm::kActivations[i].name) == 0) return i;
  return -1;
}

// Of rules.OPERATIONS, by the activation's number.
const char* const kBiasActOperations[] = {
#define FN_OPERATION(enumerator, name, ...) "bias_" name,
    FN_ACTIVATIONS(FN_OPERATION)
#undef FN_OPERATION
};

// False where the call is not for the fast path; `by_torch` where torch's own operators are to serve it.
bool parse_activation(PyObject* const* args, BiasActCall& call, bool& by_torch) {
  if (args[0] == Py_None || PyUnicode_Check(args[5])) return false;
  if (!plain_thread() || at::impl::torch_function_mode_enabled()) return false;
  if (!parse_tensor(args[0], call.x) || !parse_tensor(args[1], call.bias) || call.x.dim() < 1) return false;
  call.activation = activation_of(args[2]);
  if (call.activation < 0 || !parse_dropout(args[3], args[4], call.x, call.dropout_p, call.seed)) return false;
  const bool with_bias = call.bias.defined(), dropped = call.dropout_p > 0.0, by_shape = args[5] == Py_True;
  const int64_t columns = call.x.sizes().back();
  if (with_bias && (call.bias.dim() != 1 || call.bias.size(0) != columns)) return false;
  call.needs_grad = at::GradMode::is_enabled() && (call.x.requires_grad() || (with_bias && call.bias.requires_grad()));
  const bool one_dtype = with_bias && call.bias.scalar_type() == call.x.scalar_type();
  if (dropped) return !by_shape || !one_dtype || is_chosen("bias_gelu_dropout", call.x, columns, true);
  by_torch = !with_bias || (by_shape && !is_chosen(kBiasActOperations[call.activation], call.x, columns, call.needs_grad));
  return !by_torch || (by_shape && (one_dtype || !with_bias));
}

PyObject* bias_act_dropout(PyObject* const* args) {
  BiasActCall call{};
  bool by_torch = false;
  if (!parse_activation(args, call, by_torch)) Py_RETURN_NONE;
  at::Tensor y;
  {
    pybind11::gil_scoped_release no_gil;
    draw_where_none(call.dropout_p, call.x, call.seed);
    y = by_torch ? bias_act_by_torch(call) : bias_act_dropout(call);
  }
  return THPVariable_Wrap(y);
}

constexpr int64_t kMostHeadDim = 256;

// Four dimensions, one dtype, as many positions of keys as of values, heads that divide query's; nothing empty.
bool kernels_take(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool grouped) {
  return q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.scalar_type() == k.scalar_type() &&
         q.scalar_type() == v.scalar_type() && q.size(0) == k.size(0) && k.size(0) == v.size(0) && k.size(1) == v.size(1) &&
         k.size(2) == v.size(2) && q.size(3) == k.size(3) && q.size(3) <= kMostHeadDim && v.size(3) <= kMostHeadDim &&
         q.numel() > 0 && v.numel() > 0 && (q.size(1) == k.size(1) || (grouped && q.size(1) % k.size(1) == 0));
}

// As rules_attention.scales has it.
bool torchs_scale(double scale) { return scale > 0.0 && scale <= 128.0; }

// And whether torch's kernels do: as many heads each, features one after another.
bool torchs_take(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return q.size(1) == k.size(1) && q.size(3) == v.size(3) && q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1 &&
         at::globalContext().userEnabledFlashSDP();
}

Rule ours_is_faster;  // of fusednorm.dispatch.rules_attention

// Whether the library's kernels were measured to be faster than torch's.
bool prefers_ours(const AttentionCall& call) {
  const long long itemsize = call.query.element_size(), queries = call.query.size(2), keys = call.key.size(2);
  const long long head_dim = call.query.size(3), both = 2 * call.causal + call.needs_grad;
  return ours_is_faster({itemsize, queries, keys, head_dim, both}, "LLLLsO", itemsize, queries, keys, head_dim,
                        call.causal ? "attention_causal" : "attention", call.needs_grad ? Py_True : Py_False);
}

Rule cuda_serves;  // of fusednorm.dispatch.rules_attention

// Whether automatic choice leaves attention on a GPU, which torch's operator does not compute alike, to the CUDA library.
bool cuda_is_chosen(const at::Tensor& query) {
  const long long gpu = query.get_device();
  return cuda_serves({gpu}, "L", gpu);
}

// A side of the window: -1 for None, unbounded.
bool parse_side(PyObject* object, int64_t& side) {
  side = -1;
  if (object == Py_None) return true;
  int overflow = 0;
  if (!PyLong_CheckExact(object)) return false;
  side = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow && side >= 0;
}

bool parse_window(PyObject* object, AttentionCall& call) {
  call.window_left = call.window_right = -1;
  if (object == Py_None) return true;
  return PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2 &&
         parse_side(PyTuple_GET_ITEM(object, 0), call.window_left) &&
         parse_side(PyTuple_GET_ITEM(object, 1), call.window_right);
}

bool parse_key_mask(PyObject* object, AttentionCall& call) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  call.key_mask = THPVariable_Unpack(object);
  return plain(call.key_mask, device_key(call.by_cuda)) && call.key_mask.scalar_type() == at::kBool && call.key_mask.dim() == 2 &&
         call.key_mask.size(0) == call.query.size(0) && call.key_mask.size(1) == call.key.size(2);
}

// False where the call is not for the fast path.
bool parse_attention(PyObject* const* args, AttentionCall& call) {
  for (int i = 0; i < 3; ++i)
    if (args[i] == Py_None) return false;
  if (!plain_thread() || at::impl::torch_function_mode_enabled()) return false;
  PyObject *key_mask = args[3], *causal = args[4], *window = args[5], *scale = args[6], *grouped = args[7], *asked = args[8];
  call.by_cuda = for_cuda(args[0], asked);
  const c10::DispatchKey device = device_key(call.by_cuda);
  if (!parse_tensor(args[0], call.query, device) || !parse_tensor(args[1], call.key, device) ||
      !parse_tensor(args[2], call.value, device))
    return false;
  if (!PyBool_Check(causal) || !PyBool_Check(grouped) || !(scale == Py_None || PyFloat_CheckExact(scale))) return false;
  if (!kernels_take(call.query, call.key, call.value, grouped == Py_True)) return false;
  if (!parse_key_mask(key_mask, call) || !parse_window(window, call)) return false;
  call.scale = scale == Py_None ? 1.0 / std::sqrt(double(call.query.size(3))) : PyFloat_AS_DOUBLE(scale);
  call.causal = causal == Py_True;
  call.needs_grad = at::GradMode::is_enabled() &&
                    (call.query.requires_grad() || call.key.requires_grad() || call.value.requires_grad());
  call.native = call.key_mask.defined() || call.window_left >= 0 || call.window_right >= 0;
  if (call.by_cuda) {
    const bool chosen = PyUnicode_Check(asked) || (call.native && cuda_is_chosen(call.query));
    call.native = true;
    return chosen && cuda_takes(call);
  }
  if (call.native) return true;
  // torch's kernels add -inf to what causality masks, and scale it: what is masked must be bounded, the scale positive
  call.native = !torchs_take(call.query, call.key, call.value) || prefers_ours(call) ||
                (call.causal && !(torchs_scale(call.scale) && bounded("query", call.query) && bounded("key", call.key) &&
                                       bounded("value", call.value)));
  return true;
}

PyObject* attention(PyObject* const* args) {
  AttentionCall call;
  if (!parse_attention(args, call)) Py_RETURN_NONE;
  at::Tensor out;
  {
    pybind11::gil_scoped_release no_gil;
    out = attention(call);
  }
  return THPVariable_Wrap(out);
}

PyObject* attach(PyObject* const* args) {
  void *const norms = PyLong_AsVoidPtr(args[0]), *const attentions = PyLong_AsVoidPtr(args[1]);
  if (PyErr_Occurred()) return nullptr;
  if (!norms || !attentions) return PyErr_Format(PyExc_ValueError, "norms, attentions: expected addresses");
  const uint64_t devices = PyLong_AsUnsignedLongLong(args[3]);
  if (PyErr_Occurred()) return nullptr;
  attach_cuda({static_cast<const fusednorm::Norms*>(norms), static_cast<const fusednorm::Attentions*>(attentions),
               args[2] == Py_True, devices});
  Py_RETURN_NONE;
}

template <Py_ssize_t count, PyObject* (*function)(PyObject* const*)>
PyObject* counted(PyObject*, PyObject* const* args, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  if (given == count) return function(args);
  return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, given);
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject* const*) {
  fastpath_serves.forget();
  ours_is_faster.forget();
  cuda_serves.forget();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"rms_norm", (PyCFunction)(void*)counted<5, rms_norm>, METH_FASTCALL,
     "rms_norm(input, normalized_shape, weight, eps, asked) -> Tensor, or None: not a call for the fast path"},
    {"add_norm", (PyCFunction)(void*)counted<15, add_norm>, METH_FASTCALL,
     "add_norm(x, residual, normalized_shape, weight, bias, eps, x_bias, layer_scale, gate, scale, shift, dropout_p, seed, "
     "rms, asked) -> (normed, residual_out), or None"},
    {"bias_act_dropout", (PyCFunction)(void*)counted<6, bias_act_dropout>, METH_FASTCALL,
     "bias_act_dropout(x, bias, activation, dropout_p, seed, by_shape) -> Tensor, or None"},
    {"attention", (PyCFunction)(void*)counted<9, attention>, METH_FASTCALL,
     "attention(query, key, value, key_mask, is_causal, window, scale, enable_gqa, asked) -> Tensor, or None"},
    {"attach_cuda", (PyCFunction)(void*)counted<4, attach>, METH_FASTCALL,
     "attach_cuda(norms, attentions, emulated, devices): what the CUDA library offers, by address, and a bit for each GPU"},
    {"forget", (PyCFunction)(void*)counted<0, forget>, METH_FASTCALL, "forget(): what the rules answered"},
    {}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_fastpath", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace fusednorm_fastpath

PyMODINIT_FUNC PyInit__fastpath() {
  using namespace fusednorm_fastpath;
  if (fusednorm_cpu::abi() != fusednorm_cpu::kAbi) {
    PyErr_SetString(PyExc_ImportError, "it and libfusednorm_cpu.so are of different builds");
    return nullptr;
  }
  const bool found = fastpath_serves.find("fusednorm.dispatch.rules", "fastpath_serves") &&
                     ours_is_faster.find("fusednorm.dispatch.rules_attention", "ours_is_faster") &&
                     cuda_serves.find("fusednorm.dispatch.rules_attention", "cuda_serves");
  return found ? PyModule_Create(&definition) : nullptr;
}
