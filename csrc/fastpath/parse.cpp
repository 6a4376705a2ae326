#include "parse.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>

#include "plain.h"

namespace fusednorm_fastpath {

static bool floating(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

bool parse_tensor(PyObject* object, at::Tensor& tensor, c10::DispatchKey device) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return plain(tensor, device) && floating(tensor.scalar_type()) && tensor.dim() <= fusednorm::kMaxDims;
}

bool parse_shape(PyObject* object, at::IntArrayRef sizes, int64_t& count) {
  const auto is_size = [](PyObject* number, int64_t size) {
    int overflow = 0;
    return PyLong_CheckExact(number) && PyLong_AsLongLongAndOverflow(number, &overflow) == size && !overflow;
  };
  const bool sequence = PyTuple_Check(object) || PyList_CheckExact(object);
  count = sequence ? PySequence_Fast_GET_SIZE(object) : 1;
  if (count < 1 || count > int64_t(sizes.size())) return false;
  if (!sequence) return is_size(object, sizes.back());
  for (int64_t i = 0; i < count; ++i)
    if (!is_size(PySequence_Fast_GET_ITEM(object, i), sizes[sizes.size() - count + i])) return false;
  return true;
}

bool parse_eps(PyObject* object, bool rms, bool wide, double& eps) {
  if (object == Py_None && rms)
    eps = wide ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  else if (PyFloat_CheckExact(object))
    eps = PyFloat_AS_DOUBLE(object);
  else
    return false;
  return true;
}

bool parse_dropout(PyObject* probability, PyObject* given_seed, const at::Tensor& x, double& p, at::Tensor& seed) {
  if (!PyFloat_CheckExact(probability) && !PyLong_CheckExact(probability)) return false;
  p = PyFloat_AsDouble(probability);
  PyErr_Clear();  // of an int past what a double holds; it is -1 then
  if (!(p >= 0.0 && p < 1.0)) return false;
  if (given_seed == Py_None) return true;
  if (PyLong_CheckExact(given_seed)) {
    if (!(p > 0.0)) return true;
    const auto value = int64_t(PyLong_AsUnsignedLongLongMask(given_seed));
    seed = at::empty({1}, x.options().dtype(at::kLong));
    if (x.is_cpu())
      *seed.mutable_data_ptr<int64_t>() = value;
    else
      seed.fill_(value);
    return true;
  }
  if (!THPVariable_CheckExact(given_seed)) return false;
  const at::Tensor& given = THPVariable_Unpack(given_seed);
  const bool here = plain(given, x.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  if (!here || given.scalar_type() != at::kLong || given.numel() != 1) return false;
  if (p > 0.0) seed = given.detach().reshape({1});
  return true;
}

void draw_where_none(double p, const at::Tensor& x, at::Tensor& seed) {
  if (p > 0.0 && !seed.defined())
    seed = at::randint(std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), {1},
                       x.options().dtype(at::kLong));
}

}  // namespace fusednorm_fastpath
