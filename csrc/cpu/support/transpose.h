// Transposes of matrices in memory.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace fusednorm_cpu {
namespace FN_ISA {

// Of 16 / sizeof(C) rows and as many columns.
template <class C>
FN_INLINE void transpose_square(const C* in, int64_t ld_in, C* out, int64_t ld_out) {
#if defined(__x86_64__)
  if constexpr (sizeof(C) == 4) {
    __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + ld_in);
    __m128 c = _mm_loadu_ps(in + 2 * ld_in), d = _mm_loadu_ps(in + 3 * ld_in);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out, a), _mm_storeu_ps(out + ld_out, b), _mm_storeu_ps(out + 2 * ld_out, c);
    return _mm_storeu_ps(out + 3 * ld_out, d);
  }
#endif
  for (size_t i = 0; i < 16 / sizeof(C); ++i)
    for (size_t j = 0; j < 16 / sizeof(C); ++j) out[j * ld_out + i] = in[i * ld_in + j];
}

#if defined(__AVX512F__)
// Of 16 rows and as many columns: 96 instructions, where 16 squares of four took 256.
FN_INLINE void transpose_sixteen(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  __m512 r[16], t[16];
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * ld_in);
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto pairs = [](__m512 a, __m512 b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i += 4) {
    r[i] = pairs(t[i], t[i + 2], false), r[i + 1] = pairs(t[i], t[i + 2], true);
    r[i + 2] = pairs(t[i + 1], t[i + 3], false), r[i + 3] = pairs(t[i + 1], t[i + 3], true);
  }
  // r[4 g + j] has rows 4 g to 4 g + 3 of columns j, 4 + j, 8 + j and 12 + j
  _Pragma("GCC unroll 16") for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    _mm512_storeu_ps(out + j * ld_out, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(out + (4 + j) * ld_out, _mm512_shuffle_f32x4(c, d, 0x88));
    _mm512_storeu_ps(out + (8 + j) * ld_out, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(out + (12 + j) * ld_out, _mm512_shuffle_f32x4(c, d, 0xdd));
  }
}
#endif

// out[column][row] = in[row][column] of a dense matrix, for the columns from `first` to `end`.
inline void transpose_columns(const float* in, int64_t rows, int64_t columns, int64_t first, int64_t end, float* out) {
#if defined(__AVX512F__)
  constexpr int64_t kSide = 16;
#else
  constexpr int64_t kSide = 4;
#endif
  for (int64_t column = first; column < end; column += kSide) {
    const int64_t width = std::min(kSide, end - column);
    const float* from = in + column;
    float* to = out + column * rows;
    int64_t row = 0;
    for (; width == kSide && row + kSide <= rows; row += kSide) {
#if defined(__AVX512F__)
      transpose_sixteen(from + row * columns, columns, to + row, rows);
#else
      transpose_square(from + row * columns, columns, to + row, rows);
#endif
    }
    for (; row < rows; ++row)
      for (int64_t i = 0; i < width; ++i) to[i * rows + row] = from[row * columns + i];
  }
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
