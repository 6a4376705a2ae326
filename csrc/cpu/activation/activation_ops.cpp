// fusednorm_cpu::bias_act_dropout_fwd and _bwd, and dropout_mask: arguments checked, outputs allocated, tiles given to the
// kernels. The activation and which gradients are wanted travel in one integer, as in norm_ops.cpp.
#include <algorithm>
#include <cstring>

#include "../../common/norm_call.h"
#include "activation_args.h"
#include "bias_act.h"
#include "../support/huge_pages.h"
#include "../support/operands.h"
#include "../support/parameters.h"
#include "../support/workspace.h"

namespace fusednorm_cpu {

namespace {

using torch::stable::detail::to;

constexpr int64_t kGrain = 16384;  // elements that are worth another thread
constexpr int64_t kMostChunks = 64, kLeastRows = 8, kMostRows = 256;  // of d(bias)'s partial sums

void describe_grid(Grid& g, int64_t n_rows, int64_t n_columns, double p, const Handle& seed) {
  g.n_rows = n_rows, g.n_columns = n_columns;
  g.row_tiles = std::max<int64_t>(pieces(n_columns, kTile), 1);
  g.element = dropout("dropout_p", p);
  g.seed = g.element.on ? uint64_t(*seed_of(seed)) : 0;
}

// Everything but the bias and the outputs; the sizes of x.
Sizes describe_call(ActivationCall& a, const BiasActCall& call, const Handle& dy) {
  const Sizes s = sizes_of("x", call.x);
  STD_TORCH_CHECK(s.ndim >= 1, "x: expected at least one dimension");
  describe_grid(a, product(s.sizes, s.ndim - 1), s.sizes[s.ndim - 1], call.dropout_p, call.seed);
  a.activation = activation_of(call.options);
  describe("x", call.x, s, s.ndim - 1, a.x);
  describe("dy", dy, s.sizes, s.ndim, s.ndim - 1, a.dy);
  a.wide = a.x.dtype == kFloat64;
  a.direct = a.x.unit && (!dy || (a.dy.unit && a.dy.dtype == a.x.dtype));
  a.partials = nullptr;
  return s;
}

int64_t grain(int64_t elements_of_a_tile) { return std::max<int64_t>(kGrain / std::max<int64_t>(elements_of_a_tile, 1), 1); }

}  // namespace

Handle run_activation_forward(const BiasActCall& call) {
  ActivationCall a;
  const Sizes s = describe_call(a, call, Handle());
  Parameters<ActivationCall> parameters(a, s, s.ndim - 1);
  parameters.read("bias", call.bias, &ActivationCall::bias);
  Handle y = empty(s.ndim, s.sizes, a.x.dtype);
  if (!a.n_rows || !a.n_columns) return y;
  a.out = fresh_data(y);
  ask_for_huge_pages(a.out, times(a.n_rows, a.n_columns, kItemSize[a.x.dtype]));
  const ActivationKernels& k = *kernels().activation;
  parallel(times(a.n_rows, a.row_tiles), grain(std::min(a.n_columns, kTile)),
           plus(k.workspace(a), parameters.bytes()), [&](void* memory, int64_t begin, int64_t end) {
             parameters.over(memory, begin, end, 1, [&](const ActivationCall& own, void* rest, int64_t from, int64_t to) {
               k.forward(own, rest, from, to);
             });
           });
  return y;
}

BiasActGradients run_activation_backward(const Handle& dy, const BiasActCall& call) {
  const Handle& bias = call.bias;
  ActivationCall a;
  const Sizes s = describe_call(a, call, dy);
  Parameters<ActivationCall> parameters(a, s, s.ndim - 1);
  parameters.read("bias", bias, &ActivationCall::bias);
  const bool wants_dx = call.options.wants_dx, wants_dbias = bias && call.options.wants_dbias;
  Handle dx = wants_dx ? empty(s.ndim, s.sizes, a.x.dtype) : undefined();
  Handle dbias = wants_dbias ? empty(1, &a.n_columns, dtype_of("bias", bias)) : undefined();
  if (wants_dbias && !a.n_rows && a.n_columns)
    std::memset(fresh_data(dbias), 0, times(a.n_columns, kItemSize[dtype_of("bias", bias)]));
  if (!a.n_rows || !a.n_columns || !(wants_dx || wants_dbias)) return {std::move(dx), std::move(dbias)};
  a.out = wants_dx ? fresh_data(dx) : nullptr;
  if (wants_dx) ask_for_huge_pages(a.out, times(a.n_rows, a.n_columns, kItemSize[a.x.dtype]));
  a.rows_per_chunk = std::clamp<int64_t>(pieces(a.n_rows, kMostChunks), kLeastRows, kMostRows);
  const int64_t chunks = pieces(a.n_rows, a.rows_per_chunk);
  a.partial_stride = padded(a.n_columns);
  const PartialSums partials(wants_dbias ? times(chunks, a.partial_stride, a.wide ? 8 : 4) : 0);
  a.partials = partials.get();
  const ActivationKernels& k = *kernels().activation;
  parallel(times(chunks, a.row_tiles), grain(a.rows_per_chunk * std::min(a.n_columns, kTile)),
           plus(k.workspace(a), parameters.bytes()), [&](void* memory, int64_t begin, int64_t end) {
             parameters.over(memory, begin, end, 1, [&](const ActivationCall& own, void* rest, int64_t from, int64_t to) {
               k.backward(own, rest, from, to);
             });
           });
  if (wants_dbias)
    add_partials({a.partials, chunks, a.partial_stride, a.wide}, 1, a.n_columns, kGrain, dtype_of("bias", bias),
                 fresh_data(dbias));
  return {std::move(dx), std::move(dbias)};
}

namespace {

void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  Handle y = run_activation_forward(parse_bias_act(stack));
  give(stack, y);
}

void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle dy = parse_tensor(stack[0]);
  BiasActGradients found = run_activation_backward(dy, parse_bias_act(stack + 1));
  give(stack, found.dx, found.dbias);
}

void dropout_mask_op(StableIValue* stack, uint64_t, uint64_t) {
  const Handle seed = parse_tensor(stack[0]);
  const int64_t sizes[2] = {to<int64_t>(stack[1]), to<int64_t>(stack[2])}, strides[2] = {std::max<int64_t>(sizes[1], 1), 1};
  STD_TORCH_CHECK(sizes[0] >= 0, "rows: expected a number that is not negative, got ", sizes[0]);
  STD_TORCH_CHECK(sizes[1] >= 0, "columns: expected a number that is not negative, got ", sizes[1]);
  Grid g;
  describe_grid(g, sizes[0], sizes[1], to<double>(stack[3]), seed);
  const int64_t elements = times(sizes[0], sizes[1]);
  AtenTensorHandle tensor;
  const AOTITorchError made = aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_bool(),
                                                       aoti_torch_device_type_cpu(), -1, &tensor);
  STD_TORCH_CHECK(made == TORCH_SUCCESS, "out of memory: ", elements, " bytes for the mask");
  Handle mask(tensor);
  bool* const out = (bool*)fresh_data(mask);
  ask_for_huge_pages(out, elements);
  const ActivationKernels& k = *kernels().activation;
  const int64_t tiles = elements ? times(g.n_rows, g.row_tiles) : 0;  // rows of no columns have no memory to write to
  parallel(tiles, grain(std::min(g.n_columns, kTile)), 0,
           [&](void*, int64_t begin, int64_t end) { k.mask(g, out, begin, end); });
  give(stack, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cpu, m) {
  m.def(kBiasActDropoutFwd);
  m.def(kBiasActDropoutBwd);
  m.def("dropout_mask(Tensor seed, int rows, int columns, float p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CPU, m) {
  m.impl("bias_act_dropout_fwd", forward_op);
  m.impl("bias_act_dropout_bwd", backward_op);
  m.impl("dropout_mask", dropout_mask_op);
}

}  // namespace fusednorm_cpu
