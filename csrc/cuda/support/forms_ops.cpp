// fusednorm_cuda::forms: which form each kernel takes, for tests that have to reach all of them; and ::force, which makes the
// norms take another one.
#include <algorithm>
#include <string>
#include <vector>

#include "../activation/activation_table.h"
#include "forced.h"
#include "machine.h"
#include "../norm/norm_table.h"
#include "operands.h"

namespace fusednorm_cuda {

namespace {

std::string text(const char* kernel, const Form& f) {
  std::string text = kernel;
  for (const int number : {f.chunks, f.threads, f.rows, f.ranks, f.tiles}) text += " " + std::to_string(number);
  return text;
}

void forms_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = fusednorm::parse_tensor(stack[0]);
  const bool aligned = torch::stable::detail::to<bool>(stack[1]);
  const Sizes s = sizes_of("x", x);
  STD_TORCH_CHECK(s.ndim > 0 && s.sizes[s.ndim - 1] > 0 && s.sizes[s.ndim - 1] < kMostColumns,
                  "x: expected rows of 1 to 2**30 - 1 columns");
  const int64_t n = s.sizes[s.ndim - 1];
  const int vector = int(16 / kItemSize[dtype_of("x", x)]);
  const int device = device_of(x);
  const OnDevice guard(device);
  const Limits limit = limits(device);
  const std::string forms = text("forward", forward_form(n, vector, aligned, limit)) + "\n" +
                            text("backward", backward_form(n, vector, aligned, {aligned, false, false}, limit)) + "\n" +
                            text("activation", activation_form(n, vector, aligned, limit));
  stack[0] = torch::stable::detail::from(forms);
}

// The numbers of one form, checked: what no kernel is compiled for must not be launched.
Form form_of(int64_t chunks, int64_t threads, int64_t rows, int64_t ranks, int64_t most_threads) {
  const bool in_warp = threads >= 1 && threads <= kWarpLanes && (threads & (threads - 1)) == 0;
  STD_TORCH_CHECK(in_warp || (threads > 0 && threads % kWarpLanes == 0), "threads: a power of two up to 32, or whole warps");
  STD_TORCH_CHECK(ranks == 1 || ranks == 2 || ranks == 4 || ranks == 8, "ranks: 1, 2, 4 or 8");
  STD_TORCH_CHECK(rows >= 1 && threads * rows <= most_threads, "a block has at most ", most_threads, " threads");
  STD_TORCH_CHECK(rows == 1 || ranks == 1, "rows: 1, but for rows of one block");
  STD_TORCH_CHECK(ranks == 1 || threads >= kWarpLanes, "threads: a block of a cluster has whole warps");
  STD_TORCH_CHECK(threads * rows % kWarpLanes == 0, "a block has whole warps");
  Form form{};
  form.chunks = int(chunks), form.threads = int(threads), form.rows = int(rows), form.ranks = int(ranks);
  return form;
}

void force(std::string what, std::vector<int64_t> numbers) {
  Forced& f = forced();
  const size_t count = numbers.size();
  if (what == "forward") {
    STD_TORCH_CHECK(count == 0 || count == 4, "forward: chunks, threads, rows, ranks; or nothing");
    STD_TORCH_CHECK(!count || numbers[0] == 1 || numbers[0] == 2 || numbers[0] == 4, "chunks: 1, 2 or 4");
    STD_TORCH_CHECK(!count || numbers[2] == 1 || numbers[1] <= kWarpLanes, "forward: rows share a block within a warp only");
    f.forward = count ? form_of(numbers[0], numbers[1], numbers[2], numbers[3], 128 * numbers[0]) : Form{};
  } else if (what == "backward") {
    STD_TORCH_CHECK(count == 0 || count == 4, "backward: threads, rows, ranks, programs; or nothing");
    f.backward = count ? form_of(1, numbers[0], numbers[1], numbers[2], 512) : Form{};
    f.programs = count ? int(std::clamp<int64_t>(numbers[3], 0, 65535)) : 0;
  } else if (what == "overlap") {
    STD_TORCH_CHECK(count <= 1, "overlap: 0 or 1; or nothing");
    f.overlap = !count || numbers[0];
  } else {
    STD_TORCH_CHECK(false, "force: forward, backward or overlap");
  }
}

}  // namespace

Forced& forced() {
  static Forced all;
  return all;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cuda, m) {
  m.def("force(str what, int[] numbers) -> ()");
  m.def("forms(Tensor x, bool aligned) -> str");  // a line a kernel: its name, chunks, threads, rows, ranks, tiles
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, FN_DISPATCH_KEY, m) { m.impl("forms", &forms_op); }

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, CompositeExplicitAutograd, m) { m.impl("force", TORCH_BOX(&force)); }

}  // namespace fusednorm_cuda
