#include "activation.cuh"

#include "activation_launch.h"
#include "../support/launch.cuh"

namespace fusednorm_cuda {

namespace {

template <class T>
void launch_forward(const ActivationForward& a, const Form& f, int programs, void* cuda_stream) {
  const auto kernel = f.aligned ? bias_act_dropout_fwd_kernel<T, true> : bias_act_dropout_fwd_kernel<T, false>;
  launch<const ActivationForward>(kernel, a, {f.tiles, programs, f.threads, f.rows}, cuda_stream);
}

template <class T>
void launch_backward(const ActivationBackward& a, const Form& f, int programs, void* cuda_stream) {
  const auto kernel = f.aligned ? bias_act_dropout_bwd_kernel<T, true> : bias_act_dropout_bwd_kernel<T, false>;
  const int shared_bytes = partial_columns(f, 16 / sizeof(T)) * int(sizeof(Compute<T>));
  launch<const ActivationBackward>(kernel, a, {f.tiles, programs, f.threads, f.rows, 1, shared_bytes}, cuda_stream);
}

template <class T>
ActivationLaunchers launchers_of() {
  return {launch_forward<T>, launch_backward<T>};
}

}  // namespace

ActivationLaunchers activation_launchers(Dtype dtype) {
  switch (dtype) {
    case kFloat64: return launchers_of<double>();
    case kFloat32: return launchers_of<float>();
    case kBFloat16: return launchers_of<BFloat16>();
    case kFloat16: return launchers_of<Float16>();
  }
  throw std::runtime_error("dtype");
}

}  // namespace fusednorm_cuda
