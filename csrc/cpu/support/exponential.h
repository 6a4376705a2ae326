// The exponential function, a native register at a time, from additions, products and integer steps alone.
#pragma once

#include "simd.h"

namespace fusednorm_cpu {
namespace FN_ISA {

typedef Native<float> Floats;

typedef Native<double> Doubles;

FN_INLINE Floats magnitude(Floats v) { return (Floats)((Native<int32_t>)v & INT32_MAX); }
FN_INLINE Doubles magnitude(Doubles v) { return (Doubles)((Native<int64_t>)v & INT64_MAX); }

// The next four take fewer instructions than compilers find, or dare to use, and give the same bits everywhere.

// The lesser of |v| and a limit; of NaN one of the two.
FN_INLINE Floats magnitude_at_most(Floats v, float limit) {
#if defined(__AVX512F__)
  return (Floats)_mm512_range_ps((__m512)v, _mm512_set1_ps(limit), 0b1010);  // the lesser magnitude, without a sign
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)magnitude(v));
#elif defined(__x86_64__)
  return (Floats)_mm_min_ps(_mm_set1_ps(limit), (__m128)magnitude(v));
#else
  const Floats t = magnitude(v);
  return t > limit ? Floats{} + limit : t;
#endif
}

// The greater of v and a limit; NaN stays.
FN_INLINE Floats at_least(Floats v, float limit) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps(_mm512_set1_ps(limit), (__m512)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)v);
#elif defined(__x86_64__)
  return (Floats)_mm_max_ps(_mm_set1_ps(limit), (__m128)v);
#else
  return v < limit ? Floats{} + limit : v;
#endif
}

// The nearest integer to v, |v| < 2^22, the even one of two.
FN_INLINE Floats nearest_integer(Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: adding it and taking it off rounds to an integer
  return (v + kRound) - kRound;
#endif
}

// c + a * b where a * b needs no rounding: fused or not, the sum rounds once.
FN_INLINE Floats plus_exact(Floats c, Floats a, float b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
#else
  return c + a * b;
#endif
}

// Polynomials are evaluated by halves (Estrin's scheme): a chain of additions and products one after another would be
// longer than what processors look ahead.

// 2^n p for integers n from -150 to 0 and p near 1, rounded once.
FN_INLINE Floats scaled(Floats p, Floats n) {
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else  // in two factors, each of which is a normal number
  const Native<int32_t> exponent = (Native<int32_t>)(n + 12582912.0f) - 0x4b400000, half = exponent >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
#endif
}

// e^x for x <= 0: 1 ulp, to the last subnormal number. n ln 2 is taken off in two parts, of which the first has nine bits,
// so that its product with n is exact. The polynomial is that of Cephes' expf.
FN_INLINE Floats exponential(Floats x) {
  x = at_least(x, -104.0f);
  const Floats n = nearest_integer(x * 1.44269504f);
  const Floats r = plus_exact(x, n, -0.693359375f) + n * 2.12194440e-4f, r2 = r * r;
  const Floats p01 = r * 1.6666665459e-1f + 5.0000001201e-1f, p23 = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const Floats p45 = r * 1.9875691500e-4f + 1.3981999507e-3f;
  const Floats p = (p01 + p23 * r2) + p45 * (r2 * r2);
  return scaled((p * r2 + r) + 1.0f, n);
}

FN_INLINE Doubles scaled(Doubles p, Doubles n) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  const Native<int64_t> exponent = (Native<int64_t>)(n + 6755399441055744.0) - 0x4338000000000000;
  const Native<int64_t> half = exponent >> 1;
  return p * (Doubles)((half + 1023) << 52) * (Doubles)((exponent - half + 1023) << 52);
#endif
}

// e^x for x <= 0: 1 ulp, to the last subnormal number. The polynomial is Taylor's: its first term left out is 4e-18 of
// the sum at |r| = ln 2 / 2.
FN_INLINE Doubles exponential(Doubles x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 2^52
  const Doubles clipped = x < -746.0 ? Doubles{} - 746.0 : x;
  const Doubles n = (clipped * 1.4426950408889634 + kRound) - kRound;
  const Doubles r = (clipped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6, r2 = r * r, r4 = r2 * r2;
  const Doubles p01 = r * (1.0 / 6) + 0.5, p23 = r * (1.0 / 120) + 1.0 / 24;
  const Doubles p45 = r * (1.0 / 5040) + 1.0 / 720, p67 = r * (1.0 / 362880) + 1.0 / 40320;
  const Doubles p89 = r * (1.0 / 39916800) + 1.0 / 3628800, p1011 = r * (1.0 / 6227020800) + 1.0 / 479001600;
  const Doubles low = (p01 + p23 * r2) + (p45 + p67 * r2) * r4, high = p89 + p1011 * r2;
  return scaled(((low + high * (r4 * r4)) * r2 + r) + 1.0, n);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
