// Sizes and byte counts that do not wrap around.
//
// An expanded or an empty tensor may have any sizes, 2^60 among them. What int64 does not hold becomes kTooMany, which no
// allocator grants.
#pragma once

#include <cstdint>

#define FN_CHECKED static inline __attribute__((always_inline))  // of internal linkage: inline.h says why

namespace fusednorm {

constexpr int64_t kTooMany = INT64_MAX;

// Of numbers that are not negative, as all functions here.
FN_CHECKED int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kTooMany : product;
}
template <class... More>
FN_CHECKED int64_t times(int64_t a, int64_t b, More... more) {
  return times(times(a, b), more...);
}

FN_CHECKED int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? kTooMany : sum;
}

// Pieces of `size` that n elements are cut into.
FN_CHECKED int64_t pieces(int64_t n, int64_t size) { return n / size + (n % size != 0); }

}  // namespace fusednorm
