// Which form a norm takes for rows of n columns.
#pragma once

#include "../support/forms.h"

namespace fusednorm_cuda {

constexpr int kSlabThreads = 256;

// What a backward has to hold besides a row decides its registers. Threads of a block that rows share: two blocks a
// multiprocessor, of which one computes while the other's threads meet.
struct BackwardKind {
  bool staged, epilogue, wide_residual;
  bool plain() const { return staged && !epilogue && !wide_residual; }
  int block() const { return plain() ? 512 : 256; }
  int registers() const {  // a thread, as compiled at most
    constexpr int kPlain = 64, kStaged = 96, kEverything = 128;
    return plain() ? kPlain : staged ? kStaged : kEverything;
  }
};

// A warp for a row as far as its lanes hold it, in up to four vectors each: it waits for no other warp. Then four vectors
// and more warps: what a thread does once a row is shared by most elements. `vector`: elements of the row dtype in 16 bytes.
// Rows that are not aligned have one kernel, of two vectors a thread.
inline Form forward_form(int64_t n, int vector, bool aligned, const Limits& limits) {
  const int last = 4 * limits.forward_threads;
  Form form{};
  for (int chunks = 1; aligned && chunks <= 4; chunks *= 2) {
    form = spread(n, vector, chunks, kWarpLanes, 1);
    if (form.tiles == 1) break;
  }
  if (form.tiles != 1) form = spread(n, vector, aligned ? 4 : 2, last, limits.clusters);
  form.aligned = aligned;
  if (form.threads <= kWarpLanes && form.tiles * form.ranks == 1)
    form.rows = std::max(limits.forward_threads, kWarpLanes) / form.threads;
  return form;
}

// `tiles` counts slabs: blocks beside one another that know nothing of each other. Rows share a block as far as they fit:
// each block writes a row of partial sums, which another kernel has to read.
inline Form backward_form(int64_t n, int vector, bool aligned, const BackwardKind& kind, const Limits& limits) {
  Form form = spread(n, vector, 1, limits.backward_threads, limits.clusters);
  if (form.tiles > 1) form = spread(n, vector, 1, std::min(limits.backward_threads, kSlabThreads), 1);
  form.aligned = aligned, form.staged = kind.staged;
  const int block = std::max(std::min(limits.backward_threads, kind.block()), kWarpLanes);
  if (form.tiles * form.ranks == 1) form.rows = std::max(block / form.threads, 1);
  return form;
}

// Fewer rows a block where these would leave multiprocessors idle; a warp stays whole.
inline Form for_few_rows(Form form, int64_t n_rows, const Limits& limits) {
  const int least = std::max(kWarpLanes / form.threads, 1);
  while (form.rows / 2 >= least && ceil_div(n_rows, form.rows) < limits.processors) form.rows /= 2;
  return form;
}

// Fewer rows a block where a sample has fewer, and a block has rows of one sample; a warp stays whole.
inline Form for_short_samples(Form form, int64_t rows_per_sample) {
  while (form.rows / 2 >= std::max(kWarpLanes / form.threads, 1) && form.rows / 2 >= rows_per_sample) form.rows /= 2;
  return form;
}

// Programs for each of `samples`, of which `resident` run at a time. They run in waves. A wave takes as long as the groups
// of rows that a program visits, and its start and its partial sums as long as `kStart` more, which is assumed. Of the
// numbers from those that fill one wave on, the first that is done earliest; then as few as visit no more groups each.
inline int64_t programs_of_each(int64_t samples, int64_t groups, int64_t resident) {
  constexpr int64_t kStart = 2, kMore = 8;
  const int64_t fewest = std::max<int64_t>(1, resident / samples);
  const int64_t most = std::min<int64_t>({groups, fewest + kMore, 65535});
  int64_t best = std::min(fewest, most), least = 0;
  for (int64_t programs = best; programs <= most; ++programs) {
    const int64_t time = ceil_div(samples * programs, resident) * (ceil_div(groups, programs) + kStart);
    if (programs == best || time < least) best = programs, least = time;
  }
  return ceil_div(groups, ceil_div(groups, best));
}

}  // namespace fusednorm_cuda
