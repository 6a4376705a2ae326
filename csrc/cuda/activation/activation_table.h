// Which form bias_act_dropout takes for rows of n columns.
#pragma once

#include "../support/forms.h"

namespace fusednorm_cuda {

constexpr int kActivationBlock = 256;  // most threads

// `tiles` counts slabs of columns, of about as many threads each.
inline Form activation_form(int64_t n, int vector, bool aligned, const Limits& limits) {
  const int most = std::min(limits.backward_threads, kActivationBlock);
  const int64_t vectors = ceil_div(n, vector);
  Form form{};
  form.aligned = aligned;
  form.chunks = form.ranks = form.rows = 1;
  form.threads = int(threads_for(ceil_div(vectors, ceil_div(vectors, most))));
  form.tiles = int(ceil_div(vectors, form.threads));
  if (form.threads <= kWarpLanes && form.tiles == 1) form.rows = std::max(most, kWarpLanes) / form.threads;
  return form;
}

inline int activation_programs(int64_t n_rows, const Form& form, bool wide, const Limits& limits) {
  return programs_for(n_rows, form, wide ? 128 : 64, 0, limits);
}

}  // namespace fusednorm_cuda
