// Whether numbers are finite, by the bits of their exponents.
#pragma once

#include "attention_args.h"
#include "simd.h"

namespace fusednorm_cpu {
namespace FN_ISA {

template <class U>
bool finite_run(const U* p, int64_t n, int64_t stride, U exponent) {
  constexpr int kLanes = kBytes / int(sizeof(U));
  const Native<U> all = Native<U>{} + exponent;
  auto found = Native<U>{} != Native<U>{};
  int64_t i = 0;
  for (; stride == 1 && i + kLanes <= n; i += kLanes) {
    Native<U> bits;
    __builtin_memcpy(&bits, p + i, kBytes);
    found |= (bits & all) == all;
  }
  bool any = false;
  for (int l = 0; l < kLanes; ++l) any |= found[l] != 0;
  for (; i < n; ++i) any |= (p[i * stride] & exponent) == exponent;
  return !any;
}

inline bool finite(const void* data, Dtype dtype, int64_t n, int64_t stride) {
  if (dtype == kFloat64) return finite_run<uint64_t>((const uint64_t*)data, n, stride, 0x7ff0000000000000u);
  if (dtype == kFloat32) return finite_run<uint32_t>((const uint32_t*)data, n, stride, 0x7f800000u);
  return finite_run<uint16_t>((const uint16_t*)data, n, stride, dtype == kBFloat16 ? 0x7f80 : 0x7c00);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
