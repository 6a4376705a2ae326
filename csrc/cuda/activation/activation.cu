#include "activation.cuh"

#include "activation_launch.h"
#include "../support/launch.cuh"

namespace fusednorm_cuda {

namespace {

// f(an element)
template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case kFloat64: return f(double{});
    case kFloat32: return f(float{});
    case kBFloat16: return f(BFloat16{});
    case kFloat16: return f(Float16{});
  }
}

}  // namespace

void launch_activation(Dtype dtype, const ActivationForward& a, const Form& f, int programs, void* cuda_stream) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = f.aligned ? bias_act_dropout_fwd_kernel<T, true> : bias_act_dropout_fwd_kernel<T, false>;
    launch<const ActivationForward>(kernel, a, {f.tiles, programs, f.threads, f.rows}, cuda_stream);
  });
}

void launch_activation(Dtype dtype, const ActivationBackward& a, const Form& f, int programs, void* cuda_stream) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = f.aligned ? bias_act_dropout_bwd_kernel<T, true> : bias_act_dropout_bwd_kernel<T, false>;
    const int shared_bytes = partial_columns(f, 16 / sizeof(T)) * int(sizeof(Compute<T>));
    launch<const ActivationBackward>(kernel, a, {f.tiles, programs, f.threads, f.rows, 1, shared_bytes}, cuda_stream);
  });
}

}  // namespace fusednorm_cuda
