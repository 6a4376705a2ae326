// How vectors are read and written in their storage dtype, whole ones and a row's last.
#pragma once

#include "simd.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// float16 in integer arithmetic, where there is no instruction for it. Subnormal numbers appear in no step, so the
// result does not depend on whether the processor flushes them.
FN_INLINE Native<float> widen_half(Native<uint32_t> h) {
  typedef Native<uint32_t> U;
  typedef Native<int32_t> I;
  const U sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const U exponent = magnitude & 0x0f800000u;
  const U normal = magnitude + 0x38000000u, special = magnitude + 0x70000000u;
  const Native<float> base = (Native<float>)(U{} + 0x38800000u);
  const U small = (U)((Native<float>)(magnitude + 0x38800000u) - base);
  U r = select<uint32_t>((I)(exponent == 0x0f800000u), special, normal);
  r = select<uint32_t>((I)(exponent == 0u), small, r);
  return (Native<float>)(r | sign);
}

FN_INLINE Native<uint32_t> narrow_half(Native<float> f) {
  typedef Native<uint32_t> U;
  typedef Native<int32_t> I;
  const U bits = (U)f, sign = (bits & 0x80000000u) >> 16, magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const Native<float> half = Native<float>{} + 0.5f;  // its last place is float16's smallest step
  const U small = (U)((Native<float>)magnitude + half) - (U)half;
  U r = select<uint32_t>((I)((I)magnitude < 0x38800000), small, normal);
  r = select<uint32_t>((I)((I)magnitude >= 0x477ff000), U{} + 0x7c00u, r);
  r = select<uint32_t>((I)((I)magnitude > 0x7f800000), U{} + 0x7e00u, r);
  return r | sign;
}

FN_INLINE Native<uint32_t> narrow_bfloat16(Native<float> f) {
  typedef Native<uint32_t> U;
  const U bits = (U)f;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#if defined(__AVX512F__)
  return (U)_mm512_mask_mov_epi32((__m512i)rounded, _mm512_cmp_ps_mask((__m512)f, (__m512)f, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc0));
#else
  return select<uint32_t>((Native<int32_t>)(f != f), U{} + 0x7fc0u, rounded);
#endif
}

// __builtin_convertvector takes three to six instructions for what the processor has one or two of.
FN_INLINE HalfNative<uint16_t> pack(Native<uint32_t> words) {
#if defined(__AVX512F__)
  return (HalfNative<uint16_t>)_mm512_cvtepi32_epi16((__m512i)words);
#elif defined(__AVX2__)
  return (HalfNative<uint16_t>)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)words),
                                                _mm256_extracti128_si256((__m256i)words, 1));
#else
  return __builtin_convertvector(words, HalfNative<uint16_t>);
#endif
}

FN_INLINE Native<uint32_t> unpack(HalfNative<uint16_t> h) {
#if defined(__AVX512F__)
  return (Native<uint32_t>)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (Native<uint32_t>)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Native<uint32_t>);
#endif
}

template <class P, class V>
FN_INLINE void past_caches(P* p, const V& v) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

// Other threads see what was written past the caches before.
FN_INLINE void fence_nontemporal() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class S>
struct Storage;  // how 16-bit values are read and written

template <>
struct Storage<BFloat16> {
  static FN_INLINE Native<float> widen(HalfNative<uint16_t> h) {
    return (Native<float>)(unpack(h) << 16);
  }
  static FN_INLINE HalfNative<uint16_t> narrow(Native<float> f) {
#if defined(__AVX512BF16__)
    // The instruction takes subnormal numbers for zero, and keeps bits of a NaN.
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)f, 0xa1), 0)) return pack(narrow_bfloat16(f));
    return (HalfNative<uint16_t>)_mm512_cvtneps_pbh((__m512)f);
#else
    return pack(narrow_bfloat16(f));
#endif
  }
};

template <>
struct Storage<Float16> {
  static FN_INLINE Native<float> widen(HalfNative<uint16_t> h) {
#if defined(__AVX512F__)
    return (Native<float>)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (Native<float>)_mm256_cvtph_ps((__m128i)h);
#else
    return widen_half(unpack(h));
#endif
  }
  static FN_INLINE HalfNative<uint16_t> narrow(Native<float> f) {
#if defined(__AVX512F__)
    return (HalfNative<uint16_t>)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (HalfNative<uint16_t>)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return pack(narrow_half(f));
#endif
  }
};

// A vector as it is stored in S; `value` is what reading it back gives.
//
// `store_nontemporal` writes past the caches, without reading the line first; p is aligned to what it stores.
template <class C, class S>
struct Stored {
  HalfNative<uint16_t> bits[kNative];

  static FN_INLINE Stored of(const Vec<C>& a) {
    Stored r;
    FN_EACH(k) r.bits[k] = Storage<S>::narrow(a.v[k]);
    return r;
  }
  static FN_INLINE Stored load(const S* p) {
    Stored r;
    FN_EACH(k) __builtin_memcpy(&r.bits[k], p + k * (kBytes / 4), kBytes / 2);
    return r;
  }
  FN_INLINE void store(S* p) const {
    FN_EACH(k) __builtin_memcpy(p + k * (kBytes / 4), &bits[k], kBytes / 2);
  }
  FN_INLINE void store_nontemporal(S* p) const { FN_EACH(k) past_caches(p + k * (kBytes / 4), bits[k]); }
  FN_INLINE Vec<C> value() const {
    Vec<C> r;
    FN_EACH(k) r.v[k] = Storage<S>::widen(bits[k]);
    return r;
  }
};

template <class C>
struct Stored<C, C> {
  Vec<C> v;

  static FN_INLINE Stored of(const Vec<C>& a) { return {a}; }
  static FN_INLINE Stored load(const C* p) { return {Vec<C>::load(p)}; }
  FN_INLINE void store(C* p) const { v.store(p); }
  FN_INLINE void store_nontemporal(C* p) const { FN_EACH(k) past_caches(p + k * (kBytes / sizeof(C)), v.v[k]); }
  FN_INLINE Vec<C> value() const { return v; }
};

// A whole vector of columns, and the last one of a row, of which n exist: the others read as zero.
struct Whole {
  template <class C, class S>
  FN_INLINE Vec<C> load(const S* p) const {
    return Stored<C, S>::load(p).value();
  }
  template <class C, class S>
  FN_INLINE void store(const Stored<C, S>& a, S* p, bool nontemporal = false) const {
    if (nontemporal)
      a.store_nontemporal(p);
    else
      a.store(p);
  }
  template <class C>
  FN_INLINE Vec<C> only(const Vec<C>& a) const {
    return a;
  }
};

struct Part {
  int n;

  template <class C, class S>
  FN_INLINE Vec<C> load(const S* p) const {
#if defined(__AVX512F__)
    const int lanes = (1 << n) - 1;
    if constexpr (sizeof(S) == 2)
      return Stored<C, S>{{(HalfNative<uint16_t>)_mm256_maskz_loadu_epi16(lanes, p)}}.value();
    Vec<C> r;
    if constexpr (sizeof(S) == 4) r.v[0] = (Native<C>)_mm512_maskz_loadu_ps(lanes, p);
    if constexpr (sizeof(S) == 8) r.v[0] = (Native<C>)_mm512_maskz_loadu_pd(lanes, p);
    return r;
#else
    S lanes[Vec<C>::kLanes];
    for (int i = 0; i < Vec<C>::kLanes; ++i) lanes[i] = S{};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return Stored<C, S>::load(lanes).value();
#endif
  }
  template <class C, class S>
  FN_INLINE void store(const Stored<C, S>& a, S* p, bool = false) const {
#if defined(__AVX512F__)
    const int lanes = (1 << n) - 1;
    if constexpr (sizeof(S) == 2) _mm256_mask_storeu_epi16(p, lanes, (__m256i)a.bits[0]);
    if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, lanes, (__m512)a.v.v[0]);
    if constexpr (sizeof(S) == 8) _mm512_mask_storeu_pd(p, lanes, (__m512d)a.v.v[0]);
#else
    S lanes[Vec<C>::kLanes];
    a.store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
  }
  template <class C>
  FN_INLINE Vec<C> only(const Vec<C>& a) const {
    return a.first(n);
  }
};

// step(extent, column) for every vector of a row's columns, from the first or the last one on.
template <class C, class F>
FN_INLINE void over_columns(int64_t n, F&& step, bool descending = false) {
  constexpr int L = Vec<C>::kLanes;
  const int64_t whole = n - n % L, first = descending ? whole - L : 0, by = descending ? -L : L;
  for (int64_t i = 0, j = first; i < whole; i += L, j += by) step(Whole{}, j);
  if (whole < n) step(Part{int(n - whole)}, whole);
}

// Whether to go through columns from the last one on: where stores run ahead of loads within a page, loads wait for the
// stores to the same place of another page. `written` and `read` are what a step stores to and loads from.
inline bool stores_run_ahead(const void* written, const void* read, const void* also_read = nullptr) {
  constexpr uintptr_t kPage = 4096, kNear = 1024;
  int votes = 0;
  for (const void* p : {read, also_read}) {
    const uintptr_t ahead = p ? ((uintptr_t)written - (uintptr_t)p) % kPage : 0;
    votes += ahead > 0 && ahead <= kNear ? 1 : ahead >= kPage - kNear ? -1 : 0;
  }
  return votes > 0;
}

constexpr int64_t kSumSteps = 8;

// The same with k, which numbers four independent sums, so that one addition need not wait for the one before; fold()
// is to add them to a total. One chain of additions along a row of 133,120 put the normalized values 5 times as far off
// as torch's, which sums by blocks too. Of equal values, as cotangents often are, all lanes err alike: the mean of 8200
// was off by 2.7e-7 of them (root mean square) with blocks of 32, by 1.0e-7 with 8 steps a block and 8 blocks of those.
template <class C, class F, class G>
FN_INLINE void sum_over_columns(int64_t n, F&& step, G&& fold) {
  constexpr int L = Vec<C>::kLanes;
  int64_t j = 0;
  const auto steps = [&](int64_t end) __attribute__((always_inline)) {
    for (; j + 4 * L <= end; j += 4 * L) {
      step(Whole{}, j, 0);
      step(Whole{}, j + L, 1);
      step(Whole{}, j + 2 * L, 2);
      step(Whole{}, j + 3 * L, 3);
    }
  };
  // A loop inside a loop: with fold() in the inner one sums are kept in memory, and float32 forward ran at 0.75 the speed.
  while (j + kSumSteps * 4 * L < n) steps(j + kSumSteps * 4 * L), fold();
  steps(n);
  for (; j + L <= n; j += L) step(Whole{}, j, 0);
  if (j < n) step(Part{int(n - j)}, j, 1);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
