// Rows of any dtype and strides to and from rows of the compute type.
#pragma once

#include <type_traits>

#include "../norm/norm_args.h"
#include "storage.h"

namespace fusednorm_cpu {
namespace FN_ISA {

FN_INLINE int64_t row_offset(const Operand& o, int64_t row) {
  int64_t offset = 0;
  for (int d = o.row_dims - 1; d > 0; --d) {
    offset += row % o.rows[d].size * o.rows[d].stride;
    row /= o.rows[d].size;
  }
  return o.row_dims ? offset + row * o.rows[0].stride : 0;
}

// A row that is read as it lies; null where the operand is absent.
template <class S>
FN_INLINE const S* row_of(const Operand& o, int64_t row) {
  return o.data ? (const S*)o.data + row_offset(o, row) : nullptr;
}

constexpr int kBlock = 16;

// A block of elements, widened or narrowed: between float64 and 16 bits by way of float32.
template <class S, class C>
FN_INLINE void block_in(const S* p, C* out) {
  if constexpr (std::is_same_v<S, C>) {
    __builtin_memcpy(out, p, kBlock * sizeof(C));
  } else if constexpr (std::is_same_v<S, double>) {
    for (int i = 0; i < kBlock; ++i) out[i] = C(p[i]);
  } else if constexpr (std::is_same_v<C, float>) {
    Stored<float, S>::load(p).value().store(out);
  } else {
    float lanes[kBlock];
    block_in(p, lanes);
    for (int i = 0; i < kBlock; ++i) out[i] = lanes[i];
  }
}

template <class C, class S>
FN_INLINE void block_out(const C* in, S* p) {
  if constexpr (std::is_same_v<S, C>) {
    __builtin_memcpy(p, in, kBlock * sizeof(C));
  } else if constexpr (std::is_same_v<S, double>) {
    for (int i = 0; i < kBlock; ++i) p[i] = in[i];
  } else if constexpr (std::is_same_v<C, float>) {
    Stored<float, S>::of(Vec<float>::load(in)).store(p);
  } else {
    float lanes[kBlock];
    for (int i = 0; i < kBlock; ++i) lanes[i] = float(in[i]);
    block_out(lanes, p);
  }
}

// n elements a stride apart, widened; out has room for whole blocks.
template <class C, class S>
__attribute__((noinline)) void run_in(const S* p, int64_t stride, int64_t n, C* out) {
  int64_t j = 0;
  if (stride == 1)
    for (; j + kBlock <= n; j += kBlock) block_in(p + j, out + j);
  for (; j < n; j += kBlock) {
    S lanes[kBlock];
    for (int i = 0; i < kBlock; ++i) lanes[i] = j + i < n ? p[(j + i) * stride] : S{};
    block_in(lanes, out + j);
  }
}

template <class C, class S>
__attribute__((noinline)) void run_out(const C* in, int64_t n, S* p) {
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) block_out(in + j, p + j);
  if (j < n) {
    S lanes[kBlock];
    block_out(in + j, lanes);
    for (int i = 0; j + i < n; ++i) p[j + i] = lanes[i];
  }
}

// In through S and out again: what storing in S leaves.
template <class C, class S>
__attribute__((noinline)) void run_rounded(C* row, int64_t n, S* p) {
  for (int64_t j = 0; j < n; j += kBlock) {
    S lanes[kBlock];
    block_out(row + j, lanes);
    block_in(lanes, row + j);
    if (p)
      for (int i = 0; i < kBlock && j + i < n; ++i) p[j + i] = lanes[i];
  }
}

template <class F>
FN_INLINE void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case kFloat64: return f(double{});
    case kFloat32: return f(float{});
    case kBFloat16: return f(BFloat16{});
    case kFloat16: return f(Float16{});
  }
}

// f(compute type, storage type): rows are read and written as they lie where `direct`, as the compute type elsewhere.
template <class F>
FN_INLINE void with_row_types(bool wide, bool direct, Dtype dtype, F&& f) {
  if (wide) return f(double{}, double{});
  if (direct && dtype == kBFloat16) return f(float{}, BFloat16{});
  if (direct && dtype == kFloat16) return f(float{}, Float16{});
  f(float{}, float{});
}

// Row `row` of an operand, widened into `out`, which has padded(n) elements.
template <class C>
__attribute__((noinline)) void stage_in(const Operand& o, int64_t row, int64_t n, C* out) {
  with_dtype(o.dtype, [&](auto s) {
    typedef decltype(s) S;
    const S* p = (const S*)o.data + row_offset(o, row);
    if (o.col_dims <= 1) return run_in<C, S>(p, o.unit ? 1 : o.cols[0].stride, n, out);
    const Dim inner = o.cols[o.col_dims - 1];
    int64_t index[kMaxDims] = {};
    for (int64_t j = 0; j < n; j += inner.size) {
      run_in<C, S>(p, inner.stride, inner.size, out + j);  // what it writes past its end comes next
      for (int d = o.col_dims - 2; d >= 0; --d) {
        p += o.cols[d].stride;
        if (++index[d] < o.cols[d].size) break;
        p -= index[d] * o.cols[d].stride;
        index[d] = 0;
      }
    }
  });
}

template <class C>
__attribute__((noinline)) void stage_out(const C* row, int64_t n, Dtype dtype, void* out, int64_t offset) {
  with_dtype(dtype, [&](auto s) { run_out<C, decltype(s)>(row, n, (decltype(s)*)out + offset); });
}

// Rounds a row to the dtype it is stored in, and stores it if there is where.
template <class C>
__attribute__((noinline)) void round_row(C* row, int64_t n, Dtype dtype, void* out, int64_t offset) {
  with_dtype(dtype, [&](auto s) {
    typedef decltype(s) S;
    run_rounded<C, S>(row, n, out ? (S*)out + offset : nullptr);
  });
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
