// fusednorm_cuda::forms: which form each kernel takes, for tests that have to reach all of them.
#include <string>

#include "activation_table.h"
#include "machine.h"
#include "norm_table.h"
#include "operands.h"

namespace fusednorm_cuda {

namespace {

std::string text(const char* kernel, const Form& f) {
  std::string text = kernel;
  for (const int number : {f.chunks, f.threads, f.rows, f.ranks, f.tiles}) text += " " + std::to_string(number);
  return text;
}

void forms_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = fusednorm::take_tensor(stack[0]);
  const bool aligned = torch::stable::detail::to<bool>(stack[1]);
  const Sizes s = sizes_of(x);
  STD_TORCH_CHECK(s.ndim > 0 && s.sizes[s.ndim - 1] > 0, "x: no columns");
  const int64_t n = s.sizes[s.ndim - 1];
  const int vector = int(16 / kItemSize[dtype_of(x)]);
  const Limits limit = limits(device_of(x));
  const std::string forms = text("forward", forward_form(n, vector, aligned, limit)) + "\n" +
                            text("backward", backward_form(n, vector, aligned, limit)) + "\n" +
                            text("activation", activation_form(n, vector, aligned, limit));
  stack[0] = torch::stable::detail::from(forms);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cuda, m) {
  m.def("forms(Tensor x, bool aligned) -> str");  // a line a kernel: its name, chunks, threads, rows, ranks, tiles
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, FN_DISPATCH_KEY, m) { m.impl("forms", &forms_op); }

}  // namespace fusednorm_cuda
