// fusednorm_cuda::forms says which form each kernel takes, for tests that have to reach all of them.
// ::force makes the norms take another form. ::keep does so for rows of some columns.
#include <algorithm>
#include <memory>
#include <mutex>
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

// chunks, threads, rows, ranks
Form forward_of(const int64_t* numbers) {
  const int64_t chunks = numbers[0], threads = numbers[1], rows = numbers[2];
  STD_TORCH_CHECK(chunks == 1 || chunks == 2 || chunks == 4, "chunks: 1, 2 or 4");
  STD_TORCH_CHECK(rows == 1 || threads <= kWarpLanes, "forward: rows share a block within a warp only");
  return form_of(chunks, threads, rows, numbers[3], 128 * chunks);
}

// threads, rows, ranks
Form backward_of(const int64_t* numbers) { return form_of(1, numbers[0], numbers[1], numbers[2], 512); }

void force(std::string what, std::vector<int64_t> numbers) {
  Forced& f = forced();
  const size_t count = numbers.size();
  if (what == "forward") {
    STD_TORCH_CHECK(count == 0 || count == 4, "forward: chunks, threads, rows, ranks; or nothing");
    f.forward = count ? forward_of(numbers.data()) : Form{};
  } else if (what == "backward") {
    STD_TORCH_CHECK(count == 0 || count == 3 || count == 4, "backward: threads, rows, ranks, programs if any; or nothing");
    f.backward = count ? backward_of(numbers.data()) : Form{};
    f.programs = count == 4 ? int(std::clamp<int64_t>(numbers[3], 0, 65535)) : 0;
  } else if (what == "overlap") {
    STD_TORCH_CHECK(count <= 1, "overlap: 0 or 1; or nothing");
    f.overlap = !count || numbers[0];
  } else {
    STD_TORCH_CHECK(false, "force: forward, backward or overlap");
  }
}

// Eight numbers a form: device, 1 for the backward, columns, bytes of an element, and the form's own four. The last of a
// backward's is 0: how many programs are best depends on the number of rows.
void keep(std::vector<int64_t> numbers) {
  constexpr size_t kNumbers = 8;
  STD_TORCH_CHECK(numbers.size() % kNumbers == 0, "keep: eight numbers a form");
  auto forms = std::make_unique<KeptForms>();
  for (size_t i = 0; i < numbers.size(); i += kNumbers) {
    const int64_t *f = &numbers[i], device = f[0], n = f[2], item_size = f[3];
    STD_TORCH_CHECK(device >= 0 && device < 64 && (f[1] == 0 || f[1] == 1), "keep: a device, and 0 or 1");
    STD_TORCH_CHECK(item_size == 2 || item_size == 4 || item_size == 8, "keep: elements of 2, 4 or 8 bytes");
    const int vector = int(16 / item_size);
    STD_TORCH_CHECK(n > 0 && n < kMostColumns && n % vector == 0, "keep: columns in whole vectors of 16 bytes");
    STD_TORCH_CHECK(!f[1] || f[7] == 0, "keep: programs: 0");
    const Form form = f[1] ? backward_of(f + 4) : forward_of(f + 4);
    STD_TORCH_CHECK((form.rows & (form.rows - 1)) == 0, "keep: rows: a power of two");
    STD_TORCH_CHECK(form.ranks == 1 || form.ranks <= limits(int(device)).clusters, "keep: ranks: more than this GPU has");
    const bool holds = int64_t(form.ranks) * form.threads * form.chunks * vector >= n;
    STD_TORCH_CHECK(!f[1] || holds || form.ranks * form.rows == 1,
                    "keep: the form does not hold a row, and slabs have neither clusters nor rows side by side");
    (*forms)[kept_key(int(device), f[1], n, vector)] = form;
  }
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const KeptForms>> all;  // other threads may still look into an earlier one
  const std::lock_guard<std::mutex> lock(mutex);
  kept().store(forms->empty() ? nullptr : forms.get(), std::memory_order_release);
  if (!forms->empty()) all.push_back(std::move(forms));
}

}  // namespace

Forced& forced() {
  static Forced all;
  return all;
}

std::atomic<const KeptForms*>& kept() {
  static std::atomic<const KeptForms*> forms{nullptr};
  return forms;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cuda, m) {
  m.def("force(str what, int[] numbers) -> ()");
  m.def("keep(int[] forms) -> ()");
  m.def("forms(Tensor x, bool aligned) -> str");  // a line a kernel: its name, chunks, threads, rows, ranks, tiles
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, FN_DISPATCH_KEY, m) { m.impl("forms", &forms_op); }

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, CompositeExplicitAutograd, m) {
  m.impl("force", TORCH_BOX(&force));
  m.impl("keep", TORCH_BOX(&keep));
}

}  // namespace fusednorm_cuda
