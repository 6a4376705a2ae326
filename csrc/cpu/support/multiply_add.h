// a * b + c in one rounding, where the processor has it: half the instructions of a product. The baseline of x86-64 has
// none, and rounds twice. Only products of matrices use it.
#pragma once

#include <type_traits>

#include "simd.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// Of numbers, or of registers of them.
template <class N>
FN_INLINE N multiply_add(N a, N b, N c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<N, Native<float>>) return (N)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (std::is_same_v<N, Native<double>>) return (N)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (std::is_same_v<N, Native<float>>) return (N)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (std::is_same_v<N, Native<double>>) return (N)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
#if defined(__FMA__)
  if constexpr (std::is_same_v<N, float>) return __builtin_fmaf(a, b, c);
  if constexpr (std::is_same_v<N, double>) return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

FN_INLINE Vec<float> multiply_add(const Vec<float>& a, const Vec<float>& b, const Vec<float>& c) {
  Vec<float> r;
  FN_EACH(k) r.v[k] = multiply_add<Native<float>>(a.v[k], b.v[k], c.v[k]);
  return r;
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
