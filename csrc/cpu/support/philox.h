// Philox over vectors of counters, and the masks of a row.
#pragma once

#include "../../common/philox.h"
#include "../norm/norm_args.h"
#include "simd.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// Words sit in 64-bit lanes, whose upper halves are whatever the products left there: only lower halves are read.
typedef Native<uint64_t> Words;

struct Word {
  typedef Words Type;
  static FN_INLINE Words multiply(Words a, uint32_t multiplier) {
    const Words b = Words{} + multiplier;
#if defined(__AVX512F__)
    return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * b;
#endif
  }
  static FN_INLINE Words high(Words product) { return product >> 32; }
  static FN_INLINE Words low(Words product) { return product; }
};

constexpr int kQuads = kBytes / 8;

FN_INLINE void store_masks(Native<int32_t> keep, int32_t* out) { __builtin_memcpy(out, &keep, kBytes); }

FN_INLINE void store_masks(Native<int32_t> keep, bool* out) {
  typedef uint8_t Bytes __attribute__((vector_size(kBytes / 4)));
  const Bytes ones = __builtin_convertvector(keep & 1, Bytes);
  __builtin_memcpy(out, &ones, sizeof ones);
}

FN_INLINE void store_masks(Native<int32_t> keep, int64_t* out) {
  for (int i = 0; i < kBytes / 4; ++i) out[i] = keep[i];
}

// Masks of n columns of one mask row from `column` on, a multiple of 4, all ones where kept; writes up to 31 past n.
template <class I>
void mask_columns(uint64_t seed, uint64_t row, uint32_t threshold, int64_t column, int64_t n, I* out) {
  Words lane;
  for (int i = 0; i < kQuads; ++i) lane[i] = i;
  for (int64_t quad = 0; 4 * quad < n; quad += kQuads) {
    Words c[4] = {Words{} + uint64_t(column / 4 + quad) + lane, Words{} + uint32_t(row), Words{} + uint32_t(row >> 32),
                  Words{} + uint64_t(kElementPhiloxOffset)};
    philox<Word>(c, seed);
    const Words low = Words{} + 0xffffffffu;
    const Words first = (c[0] & low) | (c[1] << 32), second = (c[2] & low) | (c[3] << 32);
    // the two pairs of each quad side by side again
#if defined(__AVX512F__)
    const Words low_half = {first[0], second[0], first[1], second[1], first[2], second[2], first[3], second[3]};
    const Words high_half = {first[4], second[4], first[5], second[5], first[6], second[6], first[7], second[7]};
#elif defined(__AVX2__)
    const Words low_half = {first[0], second[0], first[1], second[1]};
    const Words high_half = {first[2], second[2], first[3], second[3]};
#else
    const Words low_half = {first[0], second[0]}, high_half = {first[1], second[1]};
#endif
    store_masks((Native<int32_t>)((Native<uint32_t>)low_half >= threshold), out + 4 * quad);
    store_masks((Native<int32_t>)((Native<uint32_t>)high_half >= threshold), out + 4 * quad + kBytes / 4);
  }
}

// Whether the branch of a sample is kept.
__attribute__((noinline)) inline bool path_kept(uint64_t seed, uint64_t sample, uint32_t threshold) {
  Words c[4] = {Words{}, Words{} + uint32_t(sample), Words{} + uint32_t(sample >> 32), Words{} + uint64_t(kPathPhiloxOffset)};
  philox<Word>(c, seed);
  return uint32_t(c[0][0]) >= threshold;
}

// The masks of a row, which spans several mask rows where several dimensions are normalized together.
template <class I>
__attribute__((noinline)) void row_masks(const Common& a, int64_t row, I* out) {
  const int64_t width = a.mask_columns, count = a.n_columns / width;
  for (int64_t i = 0; i < count; ++i)
    mask_columns<I>(a.seed, uint64_t(row * count + i), a.element.threshold, 0, width, out + i * width);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
