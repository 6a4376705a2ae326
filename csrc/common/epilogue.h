// z = residual + drop_path(layer_scale * dropout(x + x_bias)) and its derivative, of neighbouring columns of a row.
//
// N is a number or a vector of them, with operators. `at` says what stands at these columns: the parameters, the mask and
// the path of the row.
#pragma once

#include "inline.h"

namespace fusednorm {

enum class Path { kNone, kKept, kDropped };  // of a sample

// dropout(x + x_bias)
template <class N, class At>
FN_SHARED N dropped(const At& at, N x) {
  if (at.has_x_bias()) x = x + at.x_bias();
  if (at.drops()) x = at.kept(x * N(at.element_scale()));
  return x;
}

template <class N, class At>
FN_SHARED N through_path(const At& at, N v) {
  if (at.path() == Path::kKept) v = v * N(at.path_scale());
  if (at.path() == Path::kDropped) v = N(0);
  return v;
}

// What is added to the residual.
template <class N, class At>
FN_SHARED N branch(const At& at, N x) {
  N v = dropped(at, x);
  if (at.has_layer_scale()) v = v * at.layer_scale();
  return through_path(at, v);
}

// From z's gradient to that of x, with what it adds to the sums of x_bias and layer_scale; `x` reads x again.
template <class N, class At, class X>
FN_SHARED N branch_gradient(const At& at, N d, const X& x, bool wants_x_bias, bool wants_layer_scale, N& dx_bias,
                            N& dlayer_scale) {
  d = through_path(at, d);
  if (wants_layer_scale) at.add(dlayer_scale, d * dropped(at, x()));
  if (at.has_layer_scale()) d = d * at.layer_scale();
  if (at.drops()) d = at.kept(d * N(at.element_scale()));
  if (wants_x_bias) at.add(dx_bias, d);
  return d;
}

}  // namespace fusednorm
