// What linear layers take from the CPU library: `transposed`, a dense copy of the transpose of a float32 matrix, from which
// the gradient of a weight is computed (torch's own copy takes 4 to 12 times as long), and `few_rows`, the product with
// a weight of few rows.
#include <algorithm>

#include "../../common/norm_call.h"
#include "../support/huge_pages.h"
#include "../support/operands.h"
#include "../support/workspace.h"
#include "linear_args.h"

namespace fusednorm_cpu {

namespace {

constexpr int64_t kColumns = 16, kGrain = 1 << 15;  // columns that are read together, elements worth another thread

void transposed_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = parse_tensor(stack[0]);
  const Sizes s = sizes_of("x", x);
  STD_TORCH_CHECK(s.ndim == 2, "x: expected two dimensions, got ", s.ndim);
  const int64_t rows = s.sizes[0], columns = s.sizes[1], turned[2] = {columns, rows};
  STD_TORCH_CHECK(dtype_of("x", x) == kFloat32, "x: expected float32");
  const bool dense = s.strides[1] == 1 && s.strides[0] == columns;
  STD_TORCH_CHECK(dense || !times(rows, columns), "x: expected a contiguous matrix");
  Handle out = empty(2, turned, kFloat32);
  const float* const from = (const float*)data_of("x", x, s, kItemSize[kFloat32]);
  if (from) {
    float* const to = (float*)fresh_data(out);
    ask_for_huge_pages(to, times(rows, columns, kItemSize[kFloat32]));
    parallel(pieces(columns, kColumns), std::max<int64_t>(kGrain / times(rows, kColumns), 1), 0,
             [&](void*, int64_t begin, int64_t end) {
               const int64_t last = std::min(end * kColumns, columns);
               kernels().linear->transpose_columns(from, rows, columns, begin * kColumns, last, to);
             });
  }
  give(stack, out);
}

constexpr int64_t kFewRows = 8, kGrainBytes = 1 << 16;  // of the weight, worth another thread

void few_rows_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle x = parse_tensor(stack[0]), weight = parse_tensor(stack[1]), bias = parse_optional(stack[2]);
  const Sizes s = sizes_of("x", x), w = sizes_of("weight", weight);
  STD_TORCH_CHECK(s.ndim >= 1, "x: expected at least one dimension");
  FewRows f;
  f.rows = product(s.sizes, s.ndim - 1), f.terms = s.sizes[s.ndim - 1], f.outputs = w.ndim == 2 ? w.sizes[0] : 0;
  STD_TORCH_CHECK(w.ndim == 2 && w.sizes[1] == f.terms, "weight: its shape does not fit ", f.terms, " columns of x");
  STD_TORCH_CHECK(f.rows <= kFewRows, "x: expected at most ", kFewRows, " rows, got ", f.rows);
  f.dtype = dtype_of("x", x);
  STD_TORCH_CHECK(f.dtype != kFloat64, "x: expected float32, bfloat16 or float16");
  const auto data = [&](const char* name, const Handle& tensor, const Sizes& sizes) {
    STD_TORCH_CHECK(dtype_of(name, tensor) == f.dtype, name, ": expected the dtype of x");
    int64_t stride = 1;
    for (int64_t d = sizes.ndim - 1; d >= 0; stride *= sizes.sizes[d--])
      STD_TORCH_CHECK(sizes.sizes[d] <= 1 || sizes.strides[d] == stride, name, ": expected a contiguous tensor");
    return data_of(name, tensor, sizes, kItemSize[f.dtype]);
  };
  int64_t sizes[kMaxDims];
  STD_TORCH_CHECK(s.ndim <= kMaxDims, "x: expected at most ", kMaxDims, " dimensions, got ", s.ndim);
  std::copy(s.sizes, s.sizes + s.ndim - 1, sizes);
  sizes[s.ndim - 1] = f.outputs;
  f.bias = bias ? data("bias", bias, check_shape("bias", bias, &f.outputs, 1)) : nullptr;
  Handle out = empty(s.ndim, sizes, f.dtype);
  if (f.rows && f.outputs) {
    STD_TORCH_CHECK(f.terms, "x: expected at least one column");
    f.x = data("x", x, s), f.weight = data("weight", weight, w), f.out = fresh_data(out);
    const LinearKernels& k = *kernels().linear;
    parallel(pieces(f.outputs, kOutputs), std::max<int64_t>(kGrainBytes / times(f.terms, kOutputs * kItemSize[f.dtype]), 1),
             k.few_rows_workspace(f), [&](void* memory, int64_t begin, int64_t end) { k.few_rows(f, memory, begin, end); });
  }
  give(stack, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cpu, m) {
  m.def("transposed(Tensor x) -> Tensor");
  m.def("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CPU, m) {
  m.impl("transposed", transposed_op);
  m.impl("few_rows", few_rows_op);
}

}  // namespace fusednorm_cpu
