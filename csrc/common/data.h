// What the bindings of both libraries hand to their kernels: plain data, without inline functions.
//
// The CPU kernels are compiled once for each instruction set. An inline function with external linkage that two of those
// objects share would be merged by the linker, and the baseline could end up calling the AVX-512 one.
#pragma once

#include <cstdint>

namespace fusednorm {

enum Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kItemSize[] = {8, 4, 2, 2};

constexpr int kMaxDims = 64;  // torch itself has no limit

// A dimension after folding; the fewest that address the elements in order.
struct Dim {
  int64_t size, stride;
};

// Kept are the elements whose random word is no less than the threshold.
struct Dropout {
  bool on;
  uint32_t threshold;
  float scale;
};

}  // namespace fusednorm
