// fusednorm_cpu::add_layer_norm_fwd and _bwd: arguments checked, outputs allocated, rows given to the kernels.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../support/abi.h"
#include "../support/huge_pages.h"
#include "../support/operands.h"
#include "../support/parameters.h"
#include "../support/workspace.h"

namespace fusednorm_cpu {

namespace {

// Elements that are worth another thread: at 16384, 1024 rows of 16 ran at 0.6 of the speed, at 2048 nothing gained. A
// row costs as much as some elements by itself: 256 rows of 16 on one thread ran at 0.9 of eager's speed.
constexpr int64_t kGrain = 8192, kRowCost = 48;
// Bytes of a result that no cache would keep. Written past the caches, a gradient takes 5 to 20 % less time in float32, and
// 3 % less in 16 bits. A normed tensor takes 27 to 33 % less, and 14 to 30 % less.
constexpr int64_t kStreamed = 16 << 20;
// Rows for which converting the parameters costs more than widening them as they are read.
constexpr int64_t kFewRows = 4;
constexpr bool kSamples = true;  // a parameter may be one vector for each sample

// Rows of one partial sum of the parameters' gradients, of `groups` whose sums are apart. Eight and more, so that the sums are little beside the rows; but
// few wide rows would be one thread's (4 rows of 262144 ran at 0.87 of eager's speed, as pairs at 1.24). By sizes alone:
// the same for any number of threads.
int64_t chunk_rows(int64_t rows, int64_t columns, int64_t groups) {
  constexpr int64_t kAllChunks = 64, kMostRows = 256, kFew = 4, kLeast = 8;
  const int64_t most_chunks = std::max<int64_t>(kAllChunks / groups, 1), few = std::max<int64_t>(kFew / groups, 1);
  const int64_t pays = std::clamp<int64_t>(kGrain / std::max<int64_t>(columns, 1), 2, kLeast);
  const int64_t least = std::clamp<int64_t>(rows / few, pays, kLeast);
  return std::clamp<int64_t>(pieces(rows, most_chunks), least, kMostRows);
}

// Sizes, compute type and masks, from the tensor that has the call's shape. Returns the dimensions of rows.
template <class Call>
int64_t describe_call(Common& a, const Sizes& s, const Call& call, bool wide) {
  const Options& o = call.options;
  const int64_t lead = leading_dims(s, o);
  a.n_rows = product(s.sizes, lead);
  a.n_columns = product(s.sizes + lead, o.normalized_ndim);
  a.rows_per_sample = rows_per_sample(s, lead);
  a.mask_columns = s.sizes[s.ndim - 1];
  a.wide = wide;
  a.rms = o.rms;
  a.element = dropout("dropout_p", call.dropout_p);
  a.path = dropout("drop_path_p", call.drop_path_p);
  a.seed = a.element.on || a.path.on ? uint64_t(*seed_of(call.seed)) : 0;
  return lead;
}

// Whether an output of contiguous rows is to be written past the caches; so far as it is there at all.
bool takes_nontemporal(const Common& a, const void* data, Dtype dtype) {
  const int64_t row = times(a.n_columns, kItemSize[dtype]);
  return !data || (row % 64 == 0 && (uintptr_t)data % 64 == 0 && times(a.n_rows, row) >= kStreamed);
}

// Whether rows may be read and written as they lie.
template <class... Operands>
bool direct(const Common& a, Dtype dtype, const Operands&... operands) {
  if (a.wide != (dtype == kFloat64)) return false;
  return ((!operands.data || (operands.unit && operands.dtype == dtype)) && ...);
}

}  // namespace

int64_t abi() { return kAbi; }

Outputs run_forward(const ForwardCall& t, bool keep_statistics) {
  const Options& o = t.options;
  const Sizes s = sizes_of("x", t.x);
  Forward a;
  const Dtype x_dtype = dtype_of("x", t.x);
  const int64_t lead = describe_call(a, s, t, x_dtype == kFloat64 || o.residual_dtype == kFloat64);
  describe("x", t.x, s, lead, a.x);
  describe("residual", t.residual, s.sizes, s.ndim, lead, a.residual);
  Parameters<Forward> parameters(a, s, lead);
  parameters.read("weight", t.weight, &Forward::weight, o.zero_centered ? 1.0 : 0.0, kSamples);
  parameters.read("bias", t.bias, &Forward::bias, 0.0, kSamples);
  parameters.read("x_bias", t.x_bias, &Forward::x_bias);
  parameters.read("layer_scale", t.layer_scale, &Forward::layer_scale, 0.0, kSamples);
  a.epilogue = a.x_bias || a.layer_scale || a.element.on || a.path.on;
  a.eps = t.eps;
  a.normed_dtype = o.dtype, a.z_dtype = o.residual_dtype, a.row_dtype = x_dtype;
  a.direct = o.dtype == x_dtype && o.residual_dtype == x_dtype && direct(a, x_dtype, a.x, a.residual);
  const int64_t rows_alike = parameters.of_samples() ? a.rows_per_sample : a.n_rows;
  a.parameters_as_rows = rows_alike <= kFewRows && a.direct && !a.epilogue && parameters.left_as(x_dtype);

  const int64_t none[1] = {0}, stats_sizes[2] = {o.rms ? 1 : 2, a.n_rows};
  const Dtype wide = a.wide ? kFloat64 : kFloat32;
  Outputs out;
  out.normed = empty(s.ndim, s.sizes, o.dtype);
  out.z = o.store_residual ? empty(s.ndim, s.sizes, o.residual_dtype) : empty(1, none, o.residual_dtype);
  out.stats = keep_statistics ? empty(2, stats_sizes, wide) : undefined();
  const int64_t elements = times(a.n_rows, a.n_columns);
  if (elements == 0) {  // rows of no elements have statistics, which are NaN: so are all ones
    if (keep_statistics && a.n_rows)
      std::memset(fresh_data(out.stats), 0xff, times(stats_sizes[0], a.n_rows, kItemSize[wide]));
    return out;
  }
  double few[256];  // an aligned allocation costs as much as a row of 64
  const int64_t unkept_bytes = keep_statistics ? 0 : times(2, a.n_rows, kItemSize[wide]);
  const Buffer many = unkept_bytes > int64_t(sizeof few) ? allocate("the statistics", unkept_bytes) : nullptr;
  a.normed = fresh_data(out.normed), a.z = o.store_residual ? fresh_data(out.z) : nullptr;
  a.stats = keep_statistics ? fresh_data(out.stats) : many ? many.get() : few;
  a.nontemporal = a.direct && takes_nontemporal(a, a.normed, a.normed_dtype);
  ask_for_huge_pages(a.normed, times(elements, kItemSize[o.dtype]));
  if (a.z) ask_for_huge_pages(a.z, times(elements, kItemSize[o.residual_dtype]));
  const Kernels& k = kernels();
  parallel(a.n_rows, std::max<int64_t>(kGrain / plus(a.n_columns, kRowCost), 1),
           plus(k.forward_workspace(a), parameters.bytes()), [&](void* memory, int64_t begin, int64_t end) {
             parameters.over(memory, begin, end, a.rows_per_sample,
                             [&](const Forward& own, void* rest, int64_t from, int64_t to) { k.forward(own, rest, from, to); });
           });
  return out;
}

Gradients run_backward(const BackwardCall& call) {
  const auto& [dnormed, dresidual_out, saved, stats, weight, bias, x, x_bias, layer_scale, seed, o, dropout_p, drop_path_p] =
      call;
  const Sizes s = sizes_of("saved", saved);
  Backward a;
  const Dtype wide = dtype_of("stats", stats);  // the dtypes of what is differentiated do not say what it was computed in
  STD_TORCH_CHECK(wide == kFloat64 || wide == kFloat32, "stats: expected float32 or float64");
  const int64_t lead = describe_call(a, s, call, wide == kFloat64);
  const int64_t stats_sizes[2] = {o.rms ? 1 : 2, a.n_rows};
  const Sizes laid = check_shape("stats", stats, stats_sizes, 2);
  const bool contiguous = (a.n_rows == 1 || laid.strides[1] == 1) && (o.rms || laid.strides[0] == a.n_rows);
  STD_TORCH_CHECK(contiguous || a.n_rows == 0, "stats: expected a contiguous tensor");
  const bool wants_layer_scale = (o.output_mask >> 5 & 1) && layer_scale;
  STD_TORCH_CHECK(x || !wants_layer_scale, "x: the gradient of layer_scale needs it");
  describe("saved", saved, s, lead, a.saved);
  describe("dnormed", dnormed, s.sizes, s.ndim, lead, a.dnormed);
  describe("dresidual_out", dresidual_out, s.sizes, s.ndim, lead, a.dresidual_out);
  a.x.data = nullptr;
  if (wants_layer_scale) describe("x", x, s.sizes, s.ndim, lead, a.x);
  // their gradients have the same, read or not
  if (bias) check_samples("bias", bias, s, lead);
  if (x_bias) check_shape("x_bias", x_bias, s.sizes + lead, s.ndim - lead);
  Parameters<Backward> parameters(a, s, lead);
  a.saved_is_normed = o.saved_is_normed;
  a.bias = a.x_bias = nullptr;
  parameters.read("weight", weight, &Backward::weight, o.zero_centered ? 1.0 : 0.0, kSamples);
  if (o.saved_is_normed) parameters.read("bias", bias, &Backward::bias, 0.0, kSamples);
  if (wants_layer_scale) parameters.read("x_bias", x_bias, &Backward::x_bias);
  parameters.read("layer_scale", layer_scale, &Backward::layer_scale, 0.0, kSamples);
  a.row_dtype = a.saved.dtype;
  a.dx_dtype = o.dtype, a.dresidual_dtype = o.residual_dtype;

  Gradients outputs;
  const Handle* const like[6] = {&saved, &saved, &weight, &bias, &x_bias, &layer_scale};
  const char* const names[6] = {"saved", "saved", "weight", "bias", "x_bias", "layer_scale"};
  Dtype dtypes[6];
  void* written[6];
  const int64_t elements = times(a.n_rows, a.n_columns);
  bool any_wanted = false, grouped = parameters.of_samples();
  bool of_samples[6] = {};
  for (int i = 0; i < 6; ++i) {
    const bool wanted = (o.output_mask >> i & 1) && *like[i];
    any_wanted |= wanted;
    dtypes[i] = !wanted ? a.saved.dtype : i == 0 ? o.dtype : i == 1 ? o.residual_dtype : dtype_of(names[i], *like[i]);
    const Sizes shape = i < 2 || !wanted ? s : sizes_of(names[i], *like[i]);
    of_samples[i] = i >= 2 && wanted && shape.ndim > o.normalized_ndim;
    grouped |= of_samples[i];
    outputs.of[i] = wanted ? empty(shape.ndim, shape.sizes, dtypes[i]) : undefined();
    written[i] = wanted ? fresh_data(outputs.of[i]) : nullptr;
    if (i < 2 && wanted) ask_for_huge_pages(written[i], times(elements, kItemSize[dtypes[i]]));
    if (i >= 2 && written[i] && !a.n_rows)
      std::memset(written[i], 0, times(product(shape.sizes, shape.ndim), kItemSize[dtypes[i]]));
  }
  if (!elements || !any_wanted) return outputs;
  a.dx = written[0], a.dresidual = written[1];
  a.direct = (!a.dx || a.dx_dtype == a.row_dtype) && (!a.dresidual || a.dresidual_dtype == a.row_dtype) &&
             direct(a, a.row_dtype, a.dnormed, a.dresidual_out, a.saved, a.x);
  a.nontemporal = a.direct && takes_nontemporal(a, a.dx, a.dx_dtype) && takes_nontemporal(a, a.dresidual, a.dresidual_dtype);
  a.stats = data_of("stats", stats, laid, kItemSize[wide]);
  a.n_sums = 0;
  int* const indices[4] = {&a.sum_dweight, &a.sum_dbias, &a.sum_dx_bias, &a.sum_dlayer_scale};
  for (int i = 0; i < 4; ++i) *indices[i] = (o.output_mask >> (i + 2) & 1) && *like[i + 2] ? a.n_sums++ : -1;
  a.epilogue = a.layer_scale || a.element.on || a.path.on || a.sum_dx_bias >= 0;
  a.group_rows = grouped ? a.rows_per_sample : a.n_rows;
  const int64_t groups = a.n_rows / a.group_rows;
  a.rows_per_chunk = std::min(chunk_rows(a.group_rows, a.n_columns, groups), a.group_rows);
  a.group_chunks = pieces(a.group_rows, a.rows_per_chunk);
  const int64_t chunks = groups * a.group_chunks;
  a.partial_stride = padded(a.n_columns);
  const PartialSums partials(times(chunks, a.n_sums, a.partial_stride, a.wide ? 8 : 4));
  a.partials = partials.get();
  const Kernels& k = kernels();
  const int64_t chunk_cost = times(a.rows_per_chunk, plus(a.n_columns, kRowCost));
  parallel(chunks, std::max<int64_t>(kGrain / chunk_cost, 1), plus(k.backward_workspace(a), parameters.bytes()),
           [&](void* memory, int64_t begin, int64_t end) {
             parameters.over(memory, begin, end, a.group_chunks,
                             [&](const Backward& own, void* rest, int64_t from, int64_t to) { k.backward(own, rest, from, to); });
           });
  for (int i = 0; i < 4; ++i)
    if (*indices[i] >= 0) {
      const char* const sums = (const char*)a.partials + *indices[i] * a.partial_stride * (a.wide ? 8 : 4);
      const bool apart = of_samples[i + 2];
      const Partials of_one{sums, apart ? a.group_chunks : chunks, a.n_sums * a.partial_stride, a.wide};
      add_partials(of_one, apart ? groups : 1, a.n_columns, kGrain, dtypes[i + 2], written[i + 2]);
    }
  return outputs;
}

namespace {

void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  Outputs out = run_forward(parse_forward(stack), true);
  give(stack, out.normed, out.z, out.stats);
}

void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  Gradients gradients = run_backward(parse_backward(stack));
  for (int i = 0; i < 6; ++i) stack[i] = torch::stable::detail::from(gradients.of[i].release());
}

}  // namespace

STABLE_TORCH_LIBRARY(fusednorm_cpu, m) {
  m.def(kAddLayerNormFwd);
  m.def(kAddLayerNormBwd);
  m.def("instruction_sets() -> str");
  m.def("vendor() -> str");
  m.def("use_instruction_set(str name) -> ()");
}

// Not for AutogradCPU as well, although that would spare torch's fallback: tensors with the negative bit are resolved
// between the two.
STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CPU, m) {
  m.impl("add_layer_norm_fwd", forward_op);
  m.impl("add_layer_norm_bwd", backward_op);
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("vendor", TORCH_BOX(&vendor));
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
}

}  // namespace fusednorm_cpu
