// Philox4x32 with 7 rounds: key = (low, high) 32 bits of the seed, counter = (column / 4, row low, row high, offset).
//
// Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fusednorm {

constexpr int kRounds = 7;
constexpr int kElementPhiloxOffset = 0, kPathPhiloxOffset = 1;

// Word::Type is a 32-bit word, or a vector of them; multiply gives the whole product, of which high and low are words.
template <class Word>
FN_SHARED void philox(typename Word::Type (&c)[4], uint64_t seed) {
  using W = typename Word::Type;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  FN_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const auto p0 = Word::multiply(c[0], 0xD2511F53u), p1 = Word::multiply(c[2], 0xCD9E8D57u);
    c[0] = Word::high(p1) ^ c[1] ^ (W{} + k0);
    c[1] = Word::low(p1);
    c[2] = Word::high(p0) ^ c[3] ^ (W{} + k1);
    c[3] = Word::low(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace fusednorm
