// 64 logical bytes of lanes on every instruction set, in one to four native registers.
//
// Lane counts and the order of every sum are therefore the same everywhere, and with contraction of a * b + c off
// (setup.py) so are results, bit for bit. Products that need no rounding may be fused with a sum (exponential.h).
#pragma once

#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FN_INLINE inline __attribute__((always_inline))
#define FN_EACH(k) _Pragma("GCC unroll 4") for (int k = 0; k < kNative; ++k)

namespace fusednorm_cpu {
namespace FN_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kNative = 64 / kBytes;

// Where a vector is one register, loops over a few rows are unrolled. Elsewhere there are too few registers for it.
constexpr bool kUnrolled = kNative == 1;

// Whether a loop is compiled once more for common calls, with its conditions as constants.
template <class C>
constexpr bool kSpecialized = kNative <= 2 && sizeof(C) == 4;

// step(0), step(1), ... to N - 1. Unrolled, each index is a constant, so arrays that it picks from stay in registers.
template <class F, int... INDEX>
FN_INLINE void each_of(F&& step, std::integer_sequence<int, INDEX...>) {
  (step(std::integral_constant<int, INDEX>{}), ...);
}
template <int N, class F>
FN_INLINE void each(F&& step) {
  if constexpr (kUnrolled)
    each_of(step, std::make_integer_sequence<int, N>{});
  else
    for (int i = 0; i < N; ++i) step(i);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T, int BYTES>
struct NativeOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T>
using Native = typename NativeOf<T, kBytes>::type;
template <class T>
using HalfNative = typename NativeOf<T, kBytes / 2>::type;

// The integer of the same width, for masks.
template <int BYTES>
struct IntOf {
  typedef int32_t type;
};
template <>
struct IntOf<8> {
  typedef int64_t type;
};
template <class C>
using Int = typename IntOf<sizeof(C)>::type;

template <class T>
struct Vec {
  static constexpr int kLanes = 64 / sizeof(T);
  Native<T> v[kNative];

  Vec() = default;
  FN_INLINE explicit Vec(T value) {
    FN_EACH(k) v[k] = value - Native<T>{};  // a splat; compilers may not take 0 + value for one, value may be -0
  }
  static FN_INLINE Vec load(const T* p) {
    Vec r;
    FN_EACH(k) __builtin_memcpy(&r.v[k], p + k * (kBytes / sizeof(T)), kBytes);
    return r;
  }
  FN_INLINE void store(T* p) const {
    FN_EACH(k) __builtin_memcpy(p + k * (kBytes / sizeof(T)), &v[k], kBytes);
  }
  // The first n lanes of one, zero (+0) in the others.
  FN_INLINE Vec first(int n) const {
    Int<T> lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? -1 : 0;
    return kept(Vec<Int<T>>::load(lanes));
  }
  FN_INLINE Vec kept(const Vec<Int<T>>& mask) const {
    Vec r;
    FN_EACH(k) r.v[k] = (Native<T>)((Native<Int<T>>)v[k] & mask.v[k]);
    return r;
  }
};

#define FN_OPERATOR(op)                                        \
  template <class T>                                           \
  FN_INLINE Vec<T> operator op(const Vec<T>& a, const Vec<T>& b) { \
    Vec<T> r;                                                  \
    FN_EACH(k) r.v[k] = a.v[k] op b.v[k]; \
    return r;                                                  \
  }
FN_OPERATOR(+)
FN_OPERATOR(-)
FN_OPERATOR(*)
FN_OPERATOR(/)
#undef FN_OPERATOR

template <class T, int BYTES>
FN_INLINE T sum_of(const typename NativeOf<T, BYTES>::type& v) {
  if constexpr (BYTES == 16 && sizeof(T) == 8) return v[0] + v[1];
  if constexpr (BYTES == 16 && sizeof(T) == 4) return (v[0] + v[2]) + (v[1] + v[3]);
  if constexpr (BYTES > 16) {
    typedef typename NativeOf<T, BYTES / 2>::type Half;
    Half low, high;
#if defined(__AVX512F__)  // the compiler takes copies through memory, whose time two sums a row show on narrow rows
    if constexpr (BYTES == 64) {
      low = (Half)_mm512_castpd512_pd256((__m512d)v), high = (Half)_mm512_extractf64x4_pd((__m512d)v, 1);
      return sum_of<T, BYTES / 2>(low + high);
    }
#endif
#if defined(__AVX__)
    if constexpr (BYTES == 32) {
      low = (Half)_mm256_castpd256_pd128((__m256d)v), high = (Half)_mm256_extractf128_pd((__m256d)v, 1);
      return sum_of<T, BYTES / 2>(low + high);
    }
#endif
    __builtin_memcpy(&low, &v, BYTES / 2);
    __builtin_memcpy(&high, (const char*)&v + BYTES / 2, BYTES / 2);
    return sum_of<T, BYTES / 2>(low + high);
  }
}

// The sum of the lanes, halves first.
template <class T>
FN_INLINE T sum(const Vec<T>& a) {
  Vec<T> s = a;
  for (int half = kNative / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) s.v[k] = s.v[k] + s.v[k + half];
  return sum_of<T, kBytes>(s.v[0]);
}

// sum() of R vectors, which `of` gives by their index: of four at once in a third of the instructions.
template <class T, int R, class F>
FN_INLINE void sums_of_lanes(F&& of, T* out) {
#if defined(__AVX512F__)
  if constexpr (R == 4 && sizeof(T) == 4) {
    const __m512 a = (__m512)of(0).v[0], b = (__m512)of(1).v[0], c = (__m512)of(2).v[0], d = (__m512)of(3).v[0];
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s)));
    return;
  }
#endif
  for (int r = 0; r < R; ++r) out[r] = sum(of(r));
}

template <class T>
FN_INLINE Native<T> select(Native<Int<float>> mask, Native<T> a, Native<T> b) {
  return (Native<T>)(((Native<int32_t>)a & mask) | ((Native<int32_t>)b & ~mask));
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
