// fusednorm_cpu::transposed: a dense copy of the transpose of a float32 matrix, which the gradient of a linear layer's
// weight is computed from. torch's own copy takes 4 to 12 times as long.
#include <algorithm>

#include "../../common/norm_call.h"
#include "../norm/norm_args.h"
#include "huge_pages.h"
#include "operands.h"
#include "workspace.h"

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
               kernels().transpose_columns(from, rows, columns, begin * kColumns, last, to);
             });
  }
  give(stack, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cpu, m) { m.def("transposed(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CPU, m) { m.impl("transposed", transposed_op); }

}  // namespace fusednorm_cpu
