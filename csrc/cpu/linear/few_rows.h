// A linear layer of a few rows, as in generation: the weight is read from memory once, and its bytes are the time.
//
// A lane adds every 16th product, in chains of at most kChainVectors, whose sums are added up. The order of every sum
// depends on the number of terms alone.
#pragma once

#include "../support/multiply_add.h"
#include "../support/rows.h"
#include "linear_args.h"

namespace fusednorm_cpu {
namespace FN_ISA {

constexpr int64_t kLanes = Vec<float>::kLanes;
constexpr int64_t kChainVectors = 32;  // one chain over 64 products errs by twice what a tree of sums does
constexpr int kRowsAtOnce = 4;
constexpr int64_t kFarthest = 1024;  // elements that are fetched ahead, where the next rows do not begin before

inline int64_t padded_terms(const FewRows& f) { return (f.terms + kLanes - 1) / kLanes * kLanes; }

// The rows of x, widened, with zeros up to whole vectors.
inline int64_t few_rows_workspace(const FewRows& f) { return f.rows * padded_terms(f) * int64_t(sizeof(float)); }

// ROWS rows of x times N rows of the weight.
template <class S, int ROWS, int N>
FN_INLINE void few_products(const float* x, int64_t ld, const S* weight, int64_t terms, float (*out)[N]) {
  Vec<float> totals[N][ROWS];
  _Pragma("GCC unroll 4") for (int n = 0; n < N; ++n)
    _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r) totals[n][r] = Vec<float>(0.0f);
  const int64_t whole = terms / kLanes * kLanes;
  const int64_t next = N * terms, ahead = next < kFarthest ? next : kFarthest;
  for (int64_t first = 0; first < terms; first += kChainVectors * kLanes) {
    Vec<float> sums[N][ROWS];
    _Pragma("GCC unroll 4") for (int n = 0; n < N; ++n)
      _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r) sums[n][r] = Vec<float>(0.0f);
    const int64_t end = first + kChainVectors * kLanes < whole ? first + kChainVectors * kLanes : whole;
    const auto step = [&](int64_t k, const auto& read) {
      Vec<float> columns[N];
      _Pragma("GCC unroll 4") for (int n = 0; n < N; ++n) {
        const S* const p = weight + n * terms + k;
        columns[n] = read.template load<float>(p);
        __builtin_prefetch(p + ahead);
      }
      _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r) {
        const Vec<float> row = Vec<float>::load(x + r * ld + k);
        _Pragma("GCC unroll 4") for (int n = 0; n < N; ++n) sums[n][r] = multiply_add(columns[n], row, sums[n][r]);
      }
    };
    for (int64_t k = first; k < end; k += kLanes) step(k, Whole());
    if (end == whole && whole < terms && terms - first <= kChainVectors * kLanes) step(whole, Part{int(terms - whole)});
    _Pragma("GCC unroll 4") for (int n = 0; n < N; ++n)
      _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r) totals[n][r] = totals[n][r] + sums[n][r];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < N; ++n) out[r][n] = sum(totals[n][r]);
}

template <class S, int ROWS, int N>
FN_INLINE void few_outputs(const FewRows& f, const float* x, int64_t row, int64_t output) {
  float found[ROWS][N];
  few_products<S, ROWS, N>(x + row * padded_terms(f), padded_terms(f), (const S*)f.weight + output * f.terms, f.terms,
                           found);
  float lanes[kBlock] = {};
  if (f.bias) run_in<float, S>((const S*)f.bias + output, 1, N, lanes);
  for (int r = 0; r < ROWS; ++r) {
    float sums[kBlock] = {};
    for (int n = 0; n < N; ++n) sums[n] = f.bias ? found[r][n] + lanes[n] : found[r][n];
    run_out<float, S>(sums, N, (S*)f.out + (row + r) * f.outputs + output);
  }
}

// `N` outputs of every row, as many rows at once as registers hold.
template <class S, int N>
FN_INLINE void few_rows_of(const FewRows& f, const float* x, int64_t output) {
  constexpr int kWide = N == 1 ? 1 : 2;
  int64_t row = 0;
  for (; row + kRowsAtOnce <= f.rows; row += kRowsAtOnce)
    for (int n = 0; n < N; n += kWide) few_outputs<S, kRowsAtOnce, kWide>(f, x, row, output + n);
  for (; row + 2 <= f.rows; row += 2) few_outputs<S, 2, N>(f, x, row, output);
  for (; row < f.rows; ++row) few_outputs<S, 1, N>(f, x, row, output);
}

template <class S>
__attribute__((noinline)) void few_rows_in(const FewRows& f, float* x, int64_t begin, int64_t end) {
  const int64_t padded = padded_terms(f);
  for (int64_t row = 0; row < f.rows; ++row)
    run_in<float, S>((const S*)f.x + row * f.terms, 1, f.terms, x + row * padded);
  for (int64_t step = begin; step < end; ++step) {
    const int64_t output = step * kOutputs;
    if (output + kOutputs <= f.outputs)
      few_rows_of<S, int(kOutputs)>(f, x, output);
    else
      for (int64_t n = output; n < f.outputs; ++n) few_rows_of<S, 1>(f, x, n);
  }
}

inline void few_rows(const FewRows& f, void* workspace, int64_t begin, int64_t end) {
  if (f.dtype == kBFloat16) return few_rows_in<BFloat16>(f, (float*)workspace, begin, end);
  if (f.dtype == kFloat16) return few_rows_in<Float16>(f, (float*)workspace, begin, end);
  few_rows_in<float>(f, (float*)workspace, begin, end);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
