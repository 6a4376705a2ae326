// The masks of a vector of columns and of a row.
#pragma once

#include "../../common/philox.h"
#include "args.h"
#include "device.cuh"

namespace fusednorm_cuda {

struct Word {
  using Type = uint32_t;
  FN_DEVICE static uint64_t multiply(uint32_t a, uint32_t b) { return uint64_t(a) * b; }
  FN_DEVICE static uint32_t high(uint64_t product) { return uint32_t(product >> 32); }
  FN_DEVICE static uint32_t low(uint64_t product) { return uint32_t(product); }
};

// Bit i: whether column + i of a row is kept; `column` is a multiple of V. One call serves four columns.
template <int V>
FN_DEVICE uint32_t kept_columns(uint64_t seed, int64_t row, int column, uint32_t threshold) {
  uint32_t kept = 0;
#pragma unroll
  for (int first = 0; first < V; first += 4) {
    uint32_t c[4] = {uint32_t(column + first) / 4, uint32_t(row), uint32_t(uint64_t(row) >> 32), kElementPhiloxOffset};
    philox<Word>(c, seed);
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

}  // namespace fusednorm_cuda
