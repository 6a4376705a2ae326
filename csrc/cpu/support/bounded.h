// Whether numbers are bounded, by the bits of their exponents: no NaN, and so small that a sum of 256 products of two is
// finite.
#pragma once

#include "../attention/attention_args.h"
#include "simd.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// `bound`: the exponent's bits from which on a number is too large.
template <class U>
bool bounded_run(const U* p, int64_t n, int64_t stride, U exponent, U bound) {
  constexpr int kLanes = kBytes / int(sizeof(U));
  const Native<U> all = Native<U>{} + exponent, least = Native<U>{} + bound;
  auto found = Native<U>{} != Native<U>{};
  int64_t i = 0;
  for (; stride == 1 && i + kLanes <= n; i += kLanes) {
    Native<U> bits;
    __builtin_memcpy(&bits, p + i, kBytes);
    found |= (bits & all) >= least;
  }
  bool any = false;
  for (int l = 0; l < kLanes; ++l) any |= found[l] != 0;
  for (; i < n; ++i) any |= (p[i * stride] & exponent) >= bound;
  return !any;
}

// 2^500 in float64, 2^56 in float32 and bfloat16; every float16 that is a number, since products of two are float32.
inline bool bounded(const void* data, Dtype dtype, int64_t n, int64_t stride) {
  constexpr uint64_t kFar64 = uint64_t(1023 + 500) << 52;
  constexpr uint32_t kFar32 = uint32_t(127 + 56) << 23;
  constexpr uint16_t kFar16 = (127 + 56) << 7;
  if (dtype == kFloat64) return bounded_run<uint64_t>((const uint64_t*)data, n, stride, 0x7ff0000000000000u, kFar64);
  if (dtype == kFloat32) return bounded_run<uint32_t>((const uint32_t*)data, n, stride, 0x7f800000u, kFar32);
  if (dtype == kBFloat16) return bounded_run<uint16_t>((const uint16_t*)data, n, stride, 0x7f80, kFar16);
  return bounded_run<uint16_t>((const uint16_t*)data, n, stride, 0x7c00, 0x7c00);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
