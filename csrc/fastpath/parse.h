// Arguments from Python as they are. Each function returns false for what the fast path leaves to Python.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>

namespace fusednorm_fastpath {

// A tensor of torch's own class on the device, or undefined for None.
bool parse_tensor(PyObject* object, at::Tensor& tensor, c10::DispatchKey device = c10::DispatchKey::CPU);

// Whether normalized_shape, an int or a sequence of them, is how x's sizes end; then their number.
bool parse_shape(PyObject* object, at::IntArrayRef sizes, int64_t& count);

// None, of RMSNorm, is the machine epsilon of the type computed in: double if `wide`.
bool parse_eps(PyObject* object, bool rms, bool wide, double& eps);

// Dropout's probability, and its seed on x's device; undefined for None: to be drawn.
bool parse_dropout(PyObject* probability, PyObject* given_seed, const at::Tensor& x, double& p, at::Tensor& seed);

// As fusednorm.dropout.default_seed.
void draw_where_none(double p, const at::Tensor& x, at::Tensor& seed);

}  // namespace fusednorm_fastpath
