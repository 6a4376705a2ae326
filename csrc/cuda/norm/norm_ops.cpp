// fusednorm_cuda::add_layer_norm_fwd and _bwd: arguments checked, outputs allocated, a form chosen, kernels launched.
#include <algorithm>
#include <memory>

#include "../../common/export.h"
#include "../../common/norm_call.h"
#include "../support/forced.h"
#include "../support/machine.h"
#include "norm_launch.h"
#include "norm_table.h"
#include "../support/operands.h"
#include "../support/partials.h"

namespace fusednorm_cuda {

namespace {

// Of rows of x and normed of one dtype, beside a z of another.
Launchers launchers(Dtype dtype, Dtype z_dtype) {
  const bool wide = z_dtype != dtype;
  STD_TORCH_CHECK(!wide || (z_dtype == kFloat32 && kItemSize[dtype] == 2), "rows of these dtypes together have no kernel");
  switch (dtype) {
    case kFloat64: return float64_launchers();
    case kFloat32: return float32_launchers();
    case kBFloat16: return bfloat16_launchers(wide);
    case kFloat16: return float16_launchers(wide);
  }
  STD_TORCH_CHECK(false, "dtype");
}

struct Described {
  int64_t lead;  // dimensions of rows
  bool each[4];  // whether weight, bias, x_bias, layer_scale are one vector for each of several samples

  bool of_samples() const { return each[0] || each[1] || each[3]; }
};

// Sizes, masks and parameters. `like`, of sizes `s`, is the tensor that has the call's shape.
template <class Call>
Described describe_call(Common& a, const Handle& like, const Sizes& s, const Call& call) {
  const Options& o = call.options;
  const int64_t lead = leading_dims(s, o), columns = product(s.sizes + lead, o.normalized_ndim);
  STD_TORCH_CHECK(columns > 0 && columns < kMostColumns, "a row has no columns, or 2**30 and more");
  a.n_rows = product(s.sizes, lead);
  STD_TORCH_CHECK(a.n_rows > 0, "no rows");
  a.n_columns = int(columns);
  a.rows_per_sample = rows_per_sample(s, lead);
  a.rms = o.rms, a.zero_centered = o.zero_centered;
  STD_TORCH_CHECK(!(call.dropout_p > 0) || o.normalized_ndim == 1, "dropout over several normalized dimensions");
  a.element = dropout("dropout_p", call.dropout_p), a.path = dropout("drop_path_p", call.drop_path_p);
  check_device("seed", call.seed, like);
  a.seed = a.element.on || a.path.on ? seed_of(call.seed) : nullptr;
  const int64_t samples = a.n_rows / a.rows_per_sample;
  Described described{lead, {}};
  auto& each = described.each;
  a.weight = parameter_of("weight", call.weight, like, columns, o.dtype, samples, each[0]);
  a.bias = parameter_of("bias", call.bias, like, columns, o.dtype, samples, each[1]);
  a.x_bias = parameter_of("x_bias", call.x_bias, like, columns, o.dtype);
  a.layer_scale = parameter_of("layer_scale", call.layer_scale, like, columns, o.dtype, samples, each[3]);
  return described;
}

// Whether 32 bits address rows that lie one stride apart, and their columns.
template <class... R>
bool in_32_bits(int64_t n_rows, int64_t row_bytes, const R&... rows) {
  constexpr int64_t kEnd = int64_t(1) << 32;
  return n_rows < kEnd / 2 && row_bytes < kEnd / 2 && ((rows.inner == 0 && rows.stride < kEnd) && ...);
}

template <class... Operands>
bool all_aligned(const Common& a, int vector, const Operands&... operands) {
  return a.n_columns % vector == 0 && (aligned(operands) && ...) && aligned(a.weight, vector) &&
         aligned(a.bias, vector) && aligned(a.x_bias, vector) && aligned(a.layer_scale, vector);
}

// The kernel writes the statistics in any case.
Outputs run_forward(const ForwardCall& call, bool) {
  const auto& [x, residual, weight, bias, x_bias, layer_scale, seed, o, eps, dropout_p, drop_path_p] = call;
  const Launchers kernels = launchers(o.dtype, o.residual_dtype);
  const Sizes s = sizes_of("x", x);
  Forward a{};
  const Described described = describe_call(a, x, s, call);
  const int64_t lead = described.lead;
  a.x = rows_of("x", x, x, s, lead, o.dtype);
  a.residual_is_narrow = residual && o.residual_dtype != o.dtype && dtype_of("residual", residual) == o.dtype;
  a.residual = rows_of("residual", residual, x, s, lead, a.residual_is_narrow ? o.dtype : o.residual_dtype);
  a.eps = eps;
  STD_TORCH_CHECK(o.store_residual || !(residual || x_bias || layer_scale || a.element.on || a.path.on),
                  "what is not x itself must be stored");

  const int device = device_of(x);
  const OnDevice guard(device);
  const int64_t none[1] = {0}, stats_sizes[2] = {o.rms ? 1 : 2, a.n_rows};
  Outputs out;
  out.normed = empty(x, s.ndim, s.sizes, o.dtype);
  out.z = o.store_residual ? empty(x, s.ndim, s.sizes, o.residual_dtype) : empty(x, 1, none, o.residual_dtype);
  out.stats = empty(x, 2, stats_sizes, o.dtype == kFloat64 ? kFloat64 : kFloat32);
  a.normed = fresh_data(out.normed), a.z = o.store_residual ? fresh_data(out.z) : nullptr;
  a.stats = fresh_data(out.stats);

  const int vector = int(16 / kItemSize[o.dtype]);
  const bool fits = all_aligned(a, vector, a.x, a.residual, a.normed, a.z);
  const Form table = forward_form(a.n_columns, vector, fits, limits(device));
  Form form = chosen_form(table, false, device, a.n_columns, vector);
  const bool of_samples = described.of_samples();
  if (of_samples) {
    form = for_short_samples(form, a.rows_per_sample);
    a.blocks_per_sample = int(ceil_div(a.rows_per_sample, form.rows) * form.ranks);
  }
  const int64_t tile = int64_t(form.ranks) * form.threads * vector * form.chunks;
  a.tiles = form.tiles;
  while (1 << a.ranks_log2 < form.ranks) ++a.ranks_log2;
  a.tile_scale = 1.0f / float(power_of_two(std::min<int64_t>(tile, a.n_columns)));
  const bool epilogue = x_bias || layer_scale || a.element.on || a.path.on || a.x.inner || a.residual.inner;
  kernels.forward(a, form, of_samples ? kSampleEpilogue : epilogue ? kEpilogue : kNoEpilogue, current_cuda_stream(device));
  return out;
}

Gradients run_backward(const BackwardCall& call) {
  const auto& [dnormed, dresidual_out, saved, stats, weight, bias, x, x_bias, layer_scale, seed, o, dropout_p, drop_path_p] =
      call;
  const Dtype z_dtype = !o.saved_is_normed ? dtype_of("saved", saved)
                       : dresidual_out    ? dtype_of("dresidual_out", dresidual_out)
                                          : o.residual_dtype;
  const Launchers kernels = launchers(o.dtype, z_dtype);
  const Sizes s = sizes_of("saved", saved);
  Backward a{};
  const Described described = describe_call(a, saved, s, call);
  const int64_t lead = described.lead;
  const Dtype compute = o.dtype == kFloat64 ? kFloat64 : kFloat32;
  a.saved_is_normed = o.saved_is_normed;
  a.dnormed = rows_of("dnormed", dnormed, saved, s, lead, o.dtype);
  a.dresidual_out = rows_of("dresidual_out", dresidual_out, saved, s, lead, z_dtype);
  a.saved = rows_of("saved", saved, saved, s, lead, o.saved_is_normed ? o.dtype : z_dtype);
  a.residual_is_narrow = o.residual_dtype == o.dtype && z_dtype != o.dtype;
  STD_TORCH_CHECK(a.residual_is_narrow || o.residual_dtype == z_dtype,
                  "the residual's gradient has neither z's dtype nor x's");
  const Handle* const parameters[4] = {&weight, &bias, &x_bias, &layer_scale};
  const auto wanted = [&, mask = o.output_mask](int k) { return (mask >> k & 1) && (k < 2 || *parameters[k - 2]); };
  STD_TORCH_CHECK(!wanted(5) || x, "x: needed for the gradient of layer_scale");
  if (wanted(5)) a.x = rows_of("x", x, saved, s, lead, o.dtype);
  check_device("stats", stats, saved);
  const Sizes laid = sizes_of("stats", stats);
  STD_TORCH_CHECK(dtype_of("stats", stats) == compute && product(laid.sizes, laid.ndim) == times(o.rms ? 1 : 2, a.n_rows),
                  "stats: shape or dtype does not fit");
  bool contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(stats.get(), &contiguous));
  STD_TORCH_CHECK(contiguous, "stats: must be contiguous");
  a.stats = data_of("stats", stats, laid, kItemSize[compute]);

  const int device = device_of(saved);
  const OnDevice guard(device);
  Gradients gradients;
  int planes[6] = {-1, -1, -1, -1, -1, -1}, n_sums = 0, each = 0;
  Finalize finalize{};
  for (int k = 0; k < 6; ++k) {
    if (!wanted(k)) continue;
    const Dtype dtype = k == 0 ? o.dtype : k == 1 ? o.residual_dtype : dtype_of("parameter", *parameters[k - 2]);
    const Sizes shape = k < 2 ? s : sizes_of("parameter", *parameters[k - 2]);
    gradients.of[k] = empty(saved, shape.ndim, shape.sizes, dtype);
    if (k < 2) continue;
    finalize.gradient[n_sums] = fresh_data(gradients.of[k]), finalize.dtype[n_sums] = dtype;
    each |= int(described.each[k - 2]) << n_sums;
    planes[k] = n_sums++;
  }
  a.dx = wanted(0) ? fresh_data(gradients.of[0]) : nullptr;
  a.dresidual = wanted(1) ? fresh_data(gradients.of[1]) : nullptr;
  a.dweight = planes[2], a.dbias = planes[3], a.dx_bias = planes[4], a.dlayer_scale = planes[5];

  const Limits limit = limits(device);
  const int vector = int(16 / kItemSize[o.dtype]);
  const bool fits = all_aligned(a, vector, a.dnormed, a.dresidual_out, a.saved, a.x, a.dx, a.dresidual);
  const bool of_samples = described.of_samples();
  const bool has_epilogue = a.dx_bias >= 0 || layer_scale || a.element.on || a.path.on;
  const Epilogue epilogue = of_samples ? kSampleEpilogue : has_epilogue ? kEpilogue : kNoEpilogue;
  const bool staged = fits && !of_samples && !o.saved_is_normed && !layer_scale && !a.path.on &&
                      in_32_bits(a.n_rows, a.n_columns * kItemSize[z_dtype], a.dnormed, a.dresidual_out, a.saved);
  const BackwardKind kind{staged, has_epilogue, z_dtype != o.dtype};
  const Form table = backward_form(a.n_columns, vector, fits, kind, limit);
  Form form = for_few_rows(chosen_form(table, true, device, a.n_columns, vector), a.n_rows, limit);
  // What the programs divide: all rows, or those of each sample.
  const int64_t n_rows = of_samples ? a.rows_per_sample : a.n_rows, samples = a.n_rows / n_rows;
  if (of_samples) form = for_short_samples(form, n_rows), a.blocks_per_sample = form.ranks * form.tiles;
  const int64_t groups = ceil_div(n_rows, form.rows);
  const int64_t resident = form.ranks > 1 ? kernels.resident_clusters(form, epilogue, device, limit.processors)
                                          : resident_programs(form, kind.registers(), kernels.shared_bytes(form), limit);
  int64_t programs = of_samples ? programs_of_each(samples, groups, std::max<int64_t>(resident, 1))
                                : std::min<int64_t>({groups, resident, 65535});
  if (forced().programs) programs = std::min<int64_t>(groups, forced().programs);
  programs = std::max<int64_t>(programs, 1);
  a.rounds = int(ceil_div(n_rows, programs * form.rows));
  a.share = 1.0f / float(a.n_columns);
  const int64_t partial_sizes[3] = {n_sums, samples * programs, a.n_columns}, sums_sizes[2] = {2, a.n_rows};
  const Handle partials = n_sums ? empty(saved, 3, partial_sizes, compute) : Handle();
  const Handle sums = form.tiles > 1 ? empty(saved, 2, sums_sizes, compute) : Handle();
  a.partials = partials ? fresh_data(partials) : nullptr;
  a.sums = sums ? fresh_data(sums) : nullptr;
  void* const cuda_stream = current_cuda_stream(device);
  kernels.backward(a, form, epilogue, int(programs), cuda_stream);
  if (n_sums) {
    const bool wide = compute == kFloat64, early = limit.early && forced().overlap;
    finalize.partials = a.partials, finalize.programs = int(each ? programs : samples * programs);
    finalize.n_columns = a.n_columns;
    if (each)
      sum_sample_partials({finalize, int(samples), each, 0}, n_sums, wide, early, cuda_stream);
    else
      sum_partials(finalize, n_sums, wide, early, cuda_stream);
  }
  return gradients;
}

void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  Outputs out = run_forward(parse_forward(stack), true);
  give(stack, out.normed, out.z, out.stats);
}

// What is not wanted is a tensor without elements: an operator returns no undefined one.
void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  const BackwardCall call = parse_backward(stack);
  Gradients gradients = run_backward(call);
  const int64_t none[1] = {0};
  for (int k = 0; k < 6; ++k) {
    Handle& gradient = gradients.of[k];
    if (!gradient) gradient = empty(call.saved, 1, none, dtype_of("saved", call.saved));
    stack[k] = torch::stable::detail::from(gradient.release());
  }
}

}  // namespace

extern "C" {
FUSEDNORM_EXPORT extern const Norms fusednorm_cuda_norms;  // dispatch/fastpath.py hands over its address
const Norms fusednorm_cuda_norms = {kNormsAbi, run_forward, run_backward};
}

STABLE_TORCH_LIBRARY(fusednorm_cuda, m) {
  m.def(kAddLayerNormFwd);
  m.def(kAddLayerNormBwd);
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, FN_DISPATCH_KEY, m) {
  m.impl("add_layer_norm_fwd", &forward_op);
  m.impl("add_layer_norm_bwd", &backward_op);
}

}  // namespace fusednorm_cuda
