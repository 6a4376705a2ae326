// bias_act_dropout: y = dropout(act(x + bias)), and its backward, which makes x + bias and the mask again.
//
// A thread holds one vector of columns, whose bias and whose sum for the bias' gradient stay in registers while it goes
// down the rows. Columns past a block's are the next slab's.
#pragma once

#include "activation_values.cuh"
#include "../support/partials.cuh"
#include "../support/philox.cuh"

namespace fusednorm_cuda {

constexpr int kActivationThreads = 256;

template <class T>
constexpr int kActivationBlocks = sizeof(T) == 8 ? 2 : 4;  // of a multiprocessor: 128 or 64 registers a thread

// A thread's way down the rows, with what stays the same on it.
template <class T, bool ALIGNED>
struct Columns {
  using C = Compute<T>;
  static constexpr int V = 16 / sizeof(T);
  using N = Numbers<C, V>;

  FN_DEVICE explicit Columns(const ActivationCommon& a)
      : a_(a),
        seed(a.element.on ? uint64_t(*a.seed) : 0),
        column(int(blockIdx.x * blockDim.x + threadIdx.x) * V),
        bias(a.bias.data ? load_parameter<T, V, ALIGNED>(a.bias, column, a.n_columns) : N(0)) {}

  template <class F>
  FN_DEVICE void for_each_row(const F& step) const {
    const int64_t stride = int64_t(gridDim.y) * blockDim.y;
#pragma unroll 1
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < a_.n_rows; row += stride) step(row);
  }
  FN_DEVICE N load(const Rows& rows, int64_t row) const {
    return Raw<T, V>::template load<ALIGNED>(row_at(rows, row), column, a_.n_columns).numbers();
  }
  FN_DEVICE N biased(int64_t row) const {
    const N x = load(a_.x, row);
    return a_.bias.data ? x + bias : x;
  }
  FN_DEVICE N dropped(const N& v, int64_t row) const {
    if (!a_.element.on) return v;
    return (v * N(C(a_.element.scale))).kept(kept_columns<V>(seed, row, column, a_.element.threshold));
  }
  FN_DEVICE void store(const N& v, void* out, int64_t row) const {
    Raw<T, V>::of(v).template store<ALIGNED>(static_cast<T*>(out) + row * a_.n_columns, column, a_.n_columns);
  }

 private:
  const ActivationCommon& a_;

 public:
  const uint64_t seed;
  const int column;
  const N bias;
};

// Grid (slabs, programs), block (threads of a row, rows).
template <class T, bool ALIGNED>
FN_KERNEL(kActivationThreads, kActivationBlocks<T>)
bias_act_dropout_fwd_kernel(FN_ARGUMENT ActivationForward a) {
  using At = Columns<T, ALIGNED>;
  const At at(a);
  at.for_each_row([&](int64_t row) {
    typename At::N v = at.biased(row);
    with_activation<typename At::C>(a.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < At::V; ++i) v[i] = activation.value(v[i]);
    });
    at.store(at.dropped(v, row), a.y, row);
  });
}

template <class T, bool ALIGNED>
FN_KERNEL(kActivationThreads, kActivationBlocks<T>)
bias_act_dropout_bwd_kernel(FN_ARGUMENT ActivationBackward a) {
  using At = Columns<T, ALIGNED>;
  const At at(a);
  typename At::N dbias(0);
  at.for_each_row([&](int64_t row) {
    const typename At::N dy = at.load(a.dy, row);
    typename At::N d = at.biased(row);
    with_activation<typename At::C>(a.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < At::V; ++i) d[i] = dy[i] * activation.slope(d[i]);
    });
    d = at.dropped(d, row);
    if (a.dx) at.store(d, a.dx, row);
    dbias = dbias + d;
  });
  if (a.partials) write_partials<ALIGNED>(a.partials, 0, at.column, a.n_columns, 0, dbias);
}

}  // namespace fusednorm_cuda
