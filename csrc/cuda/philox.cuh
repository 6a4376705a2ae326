// Philox4x32 with 7 rounds: key = (low, high) 32 bits of the seed, counter = (column / 4, row low, row high, stream).
//
// Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "device.cuh"
#include "norm_args.h"
#include "values.cuh"

namespace fusednorm_cuda {

constexpr int kRounds = 7;
constexpr uint32_t kElementStream = 0, kPathStream = 1;

FN_DEVICE void philox(uint32_t (&c)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
    c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Bit i: whether column + i of a row is kept; `column` is a multiple of V. One call serves four columns.
template <int V>
FN_DEVICE uint32_t kept_columns(uint64_t seed, int64_t row, int column, uint32_t threshold) {
  uint32_t kept = 0;
#pragma unroll
  for (int first = 0; first < V; first += 4) {
    uint32_t c[4] = {uint32_t(column + first) / 4, uint32_t(row), uint32_t(uint64_t(row) >> 32), kElementStream};
    philox(c, seed);
    if constexpr (V == 2) {
      const bool second = column % 4 != 0;
      kept = uint32_t((second ? c[2] : c[0]) >= threshold) | uint32_t((second ? c[3] : c[1]) >= threshold) << 1;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) kept |= uint32_t(c[i] >= threshold) << (first + i);
    }
  }
  return kept;
}

// Drop path's factor for a row: 0, or 1 / (1 - p); 1 where there is no drop path.
FN_DEVICE float path_factor(const Common& a, uint64_t seed, int64_t row) {
  if (!a.path.on) return 1.0f;
  const uint64_t sample = uint64_t(row / a.rows_per_sample);
  uint32_t c[4] = {0, uint32_t(sample), uint32_t(sample >> 32), kPathStream};
  philox(c, seed);
  return c[0] >= a.path.threshold ? a.path.scale : 0.0f;
}

// dropout(x + x_bias) of V columns.
template <class T, int V, bool ALIGNED>
FN_DEVICE void drop(const Common& a, uint64_t seed, int64_t row, int column, Compute<T> (&x)[V]) {
  if (a.x_bias.data) {
    Compute<T> x_bias[V];
    load_parameter<T, V, ALIGNED>(a.x_bias, column, a.n_columns, x_bias);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] += x_bias[i];
  }
  if (a.element.on) {
    const uint32_t kept = kept_columns<V>(seed, row, column, a.element.threshold);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = kept >> i & 1 ? x[i] * Compute<T>(a.element.scale) : Compute<T>(0);
  }
}

}  // namespace fusednorm_cuda
