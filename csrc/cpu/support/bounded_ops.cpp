// fusednorm_cpu::all_bounded: whether all elements of up to three tensors are (bounded.h), in one pass over each.
#include <algorithm>
#include <atomic>

#include "../attention/attention.h"
#include "../attention/attention_args.h"
#include "operands.h"
#include "workspace.h"

namespace fusednorm_cpu {

namespace {

constexpr int64_t kChunk = 1 << 14, kGrain = 1 << 18;  // elements

}  // namespace

// The elements in the order of their addresses, those that are repeated once.
bool all_bounded(const char* name, const Handle& tensor) {
  const Sizes s = sizes_of(name, tensor);
  const Dtype dtype = dtype_of(name, tensor);
  const char* const data = data_of(name, tensor, s, kItemSize[dtype]);
  if (!data) return true;
  Dim dims[kMaxDims];
  int64_t n_dims = 0;
  for (int64_t d = 0; d < s.ndim; ++d)
    if (s.sizes[d] > 1 && s.strides[d] != 0) dims[n_dims++] = {s.sizes[d], s.strides[d]};
  std::sort(dims, dims + n_dims, [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  int folded = fold(dims, n_dims);
  const Dim inner = folded ? dims[--folded] : Dim{1, 1};
  int64_t runs = 1;
  for (int64_t d = 0; d < folded; ++d) runs *= dims[d].size;
  const int64_t chunks = pieces(inner.size, kChunk), each = std::min(inner.size, kChunk);
  std::atomic<bool> found{false};
  parallel(runs * chunks, std::max<int64_t>(kGrain / each, 1), 0, [&](void*, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end && !found; ++item) {
      const int64_t first = item % chunks * kChunk;
      int64_t offset = first * inner.stride, run = item / chunks;
      for (int64_t d = folded - 1; d >= 0; run /= dims[d].size, --d) offset += run % dims[d].size * dims[d].stride;
      const int64_t n = std::min(kChunk, inner.size - first);
      if (!kernels().attention->bounded(data + offset * kItemSize[dtype], dtype, n, inner.stride)) found = true;
    }
  });
  return !found;
}

namespace {

void all_bounded_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle a = parse_tensor(stack[0]), b = parse_optional(stack[1]), c = parse_optional(stack[2]);
  const bool bounded = all_bounded("a", a) && (!b || all_bounded("b", b)) && (!c || all_bounded("c", c));
  stack[0] = torch::stable::detail::from(bounded);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cpu, m) { m.def("all_bounded(Tensor a, Tensor? b, Tensor? c) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CPU, m) { m.impl("all_bounded", all_bounded_op); }

}  // namespace fusednorm_cpu
