// Which form a norm takes for rows of n columns.
#pragma once

#include "forms.h"

namespace fusednorm_cuda {

constexpr int kBackwardBlock = 256;  // threads of a block of narrow rows

// `vector`: elements of the row dtype in 16 bytes. Rows that are not aligned have one kernel, of two vectors a thread.
inline Form forward_form(int64_t n, int vector, bool aligned, const Limits& limits) {
  const int last = 4 * limits.forward_threads;
  Form form = spread(n, vector, 2, last, limits.clusters);
  for (int chunks = 1; aligned && chunks <= 4; chunks *= 2) {
    form = spread(n, vector, chunks, limits.forward_threads * chunks, chunks == 4 ? limits.clusters : 1);
    if (form.tiles == 1) break;
  }
  form.aligned = aligned;
  if (form.threads <= kWarpLanes && form.tiles * form.ranks == 1)
    form.rows = std::max(limits.forward_threads, kWarpLanes) / form.threads;
  return form;
}

// `tiles` counts slabs: blocks beside one another that know nothing of each other.
inline Form backward_form(int64_t n, int vector, bool aligned, const Limits& limits) {
  Form form = spread(n, vector, 1, limits.backward_threads, limits.clusters);
  const int small = std::min(limits.backward_threads, kBackwardBlock);
  if (form.tiles > 1) form = spread(n, vector, 1, small, 1);
  form.aligned = aligned;
  if (form.threads <= kWarpLanes && form.tiles * form.ranks == 1) form.rows = std::max(small, kWarpLanes) / form.threads;
  return form;
}

// Registers a thread, as compiled at most: two or one blocks of 512 threads, and more of smaller ones.
inline int backward_registers(const Form& form, bool epilogue, bool wide_stream) {
  constexpr int kPlain = 64, kStaged = 96, kEverything = 128;
  return !form.staged ? kEverything : epilogue || wide_stream ? kStaged : kPlain;
}

}  // namespace fusednorm_cuda
