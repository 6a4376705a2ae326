// Products of tiles of the compute type, and what packs them.
//
// Every element is added in one order, whatever the sizes are: chains of kChain products, one after another; so the
// kernels that compute a logit anew get the same bits, and no result depends on how rows are cut into tiles. Products are
// fused with sums where the processor can (multiply_add.h).
#pragma once

#include <type_traits>

#include "attention_args.h"
#include "../support/multiply_add.h"
#include "../support/rows.h"
#include "../support/transpose.h"

namespace fusednorm_cpu {
namespace FN_ISA {

template <class C>
constexpr int kNativeLanes = kBytes / int(sizeof(C));

template <class C>
FN_INLINE Native<C> native_load(const C* p) {
  Native<C> v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}

template <class C>
FN_INLINE void native_store(Native<C> v, C* p) {
  __builtin_memcpy(p, &v, kBytes);
}

template <class C>
FN_INLINE Native<C> splat(C value) {
  return value - Native<C>{};
}

// How many rows and native vectors of a product are in registers at once: as many as there are, and no fewer than hide
// the latency of an addition.
constexpr int kProductRows = kBytes == 64 ? 8 : 4;
constexpr int kProductVectors = 2;

// One chain over 64 products errs by 2.1 times what a tree of sums does (over 256: 3.1), and torch has a tree where one
// side is one row; chains of 32 err by 1.6 times (1.3), and cost 3% of the time.
constexpr int64_t kChain = 32;

// c[r][n] = (ADDS ? c[r][n] : 0) + sum_k a[r * a_row + k * a_k] b[k * ld_b + n], one chain
template <class C, int ROWS, int VECTORS, bool ADDS>
FN_INLINE void chain_in_registers(const C* a, int64_t a_row, int64_t a_k, const C* b, int64_t ld_b, int64_t n_k, C* c,
                                  int64_t ld_c) {
  constexpr int W = kNativeLanes<C>;
  Native<C> sums[ROWS][VECTORS];
  _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)
    _Pragma("GCC unroll 8") for (int n = 0; n < VECTORS; ++n) sums[r][n] = Native<C>{};
  for (int64_t k = 0; k < n_k; ++k) {
    Native<C> columns[VECTORS];
    _Pragma("GCC unroll 8") for (int n = 0; n < VECTORS; ++n) columns[n] = native_load(b + k * ld_b + n * W);
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r) {
      const Native<C> row = splat(a[r * a_row + k * a_k]);
      _Pragma("GCC unroll 8") for (int n = 0; n < VECTORS; ++n) sums[r][n] = multiply_add(row, columns[n], sums[r][n]);
    }
  }
  _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)
    _Pragma("GCC unroll 8") for (int n = 0; n < VECTORS; ++n) {
      C* const out = c + r * ld_c + n * W;
      native_store(ADDS ? native_load(out) + sums[r][n] : sums[r][n], out);
    }
}

template <class C, int ROWS, int VECTORS, bool ADDS>
FN_INLINE void product_in_registers(const C* a, int64_t a_row, int64_t a_k, const C* b, int64_t ld_b, int64_t n_k, C* c,
                                    int64_t ld_c) {
  chain_in_registers<C, ROWS, VECTORS, ADDS>(a, a_row, a_k, b, ld_b, n_k < kChain ? n_k : kChain, c, ld_c);
  for (int64_t k = kChain; k < n_k; k += kChain)
    chain_in_registers<C, ROWS, VECTORS, true>(a + k * a_k, a_row, a_k, b + k * ld_b, ld_b,
                                               n_k - k < kChain ? n_k - k : kChain, c, ld_c);
}

template <class C, int VECTORS, bool ADDS>
FN_INLINE void product_columns(int64_t rows, const C* a, int64_t a_row, int64_t a_k, const C* b, int64_t ld_b,
                               int64_t n_k, C* c, int64_t ld_c) {
  int64_t r = 0;
  for (; r + kProductRows <= rows; r += kProductRows)
    product_in_registers<C, kProductRows, VECTORS, ADDS>(a + r * a_row, a_row, a_k, b, ld_b, n_k, c + r * ld_c, ld_c);
  if (kProductRows > 4 && r + 4 <= rows) {
    product_in_registers<C, 4, VECTORS, ADDS>(a + r * a_row, a_row, a_k, b, ld_b, n_k, c + r * ld_c, ld_c);
    r += 4;
  }
  for (; r < rows; ++r)
    product_in_registers<C, 1, VECTORS, ADDS>(a + r * a_row, a_row, a_k, b, ld_b, n_k, c + r * ld_c, ld_c);
}

// `columns` is rounded up to whole vectors of 64 bytes, in b and c too.
template <class C, bool ADDS>
__attribute__((noinline)) void product(int64_t rows, int64_t columns, int64_t n_k, const C* a, int64_t a_row,
                                       int64_t a_k, const C* b, int64_t ld_b, C* c, int64_t ld_c) {
  constexpr int W = kNativeLanes<C>;
  const int64_t whole = (columns + Vec<C>::kLanes - 1) / Vec<C>::kLanes * Vec<C>::kLanes;
  int64_t n = 0;
  for (; n + kProductVectors * W <= whole; n += kProductVectors * W)
    product_columns<C, kProductVectors, ADDS>(rows, a, a_row, a_k, b + n, ld_b, n_k, c + n, ld_c);
  for (; n < whole; n += W) product_columns<C, 1, ADDS>(rows, a, a_row, a_k, b + n, ld_b, n_k, c + n, ld_c);
}

// c[r][n] += sum_k a b over the k that row r sees: what it does not see is not multiplied by a zero, which makes NaN of
// NaN and infinity. `hidden` and `kept` are addressed as a: not seen are elements of -inf, and of 0; either may be null.
template <class C>
__attribute__((noinline)) void product_of_seen(int64_t rows, int64_t columns, int64_t n_k, const C* a, int64_t a_row,
                                               int64_t a_k, const C* hidden, const Int<C>* kept, const C* b,
                                               int64_t ld_b, C* c, int64_t ld_c) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < n_k; ++k) {
      const int64_t at = r * a_row + k * a_k;
      if ((hidden && hidden[at] == -C(__builtin_inf())) || (kept && !kept[at])) continue;
      for (int64_t n = 0; n < columns; ++n) c[r * ld_c + n] = multiply_add(a[at], b[k * ld_b + n], c[r * ld_c + n]);
    }
}

template <class C>
FN_INLINE bool all_finite(const C* p, int64_t rows, int64_t columns, int64_t ld) {
  C total = 0;  // of zeros, or NaN
  for (int64_t r = 0; r < rows; ++r) {
    Vec<C> zeros(C(0));
    for (int64_t n = 0; n < columns; n += Vec<C>::kLanes) zeros = zeros + Vec<C>::load(p + r * ld + n) * Vec<C>(C(0));
    total += sum(zeros);
  }
  return total == C(0);
}

// An odd number of kBlocks: see kStride.
FN_INLINE int64_t padded_dim(int64_t dim) { return ((dim + kBlock - 1) / kBlock | 1) * kBlock; }

// Rows of a tensor, widened; columns up to a multiple of kBlock are zeros.
template <class C>
__attribute__((noinline)) void stage_rows(const Strided& t, Dtype dtype, int64_t offset, int64_t rows, int64_t columns,
                                          C* out, int64_t ld) {
  with_dtype(dtype, [&](auto s) {
    typedef decltype(s) S;
    for (int64_t r = 0; r < rows; ++r)
      run_in<C, S>((const S*)t.data + offset + r * t.position, t.feature, columns, out + r * ld);
  });
}

// Rows of a tensor where they lie, if products can read them there; else staged in `memory`. `ld` becomes theirs.
template <class C>
FN_INLINE const C* rows_of(const Strided& t, Dtype dtype, int64_t offset, int64_t rows, int64_t columns, C* memory,
                           int64_t& ld) {
  if (dtype == (sizeof(C) == 8 ? kFloat64 : kFloat32) && t.feature == 1 && columns % kBlock == 0) {
    ld = t.position;
    return (const C*)t.data + offset;
  }
  stage_rows(t, dtype, offset, rows, columns, memory, ld);
  return memory;
}

// p[r][n] = step(p[r][n], r) for whole vectors.
template <class C, class F>
FN_INLINE void over_rows(C* p, int64_t rows, int64_t columns, int64_t ld, F&& step) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < columns; n += Vec<C>::kLanes) step(Vec<C>::load(p + r * ld + n), r).store(p + r * ld + n);
}

// Rows of C to rows of a tensor.
template <class C>
__attribute__((noinline)) void unstage_rows(const C* in, int64_t ld, int64_t rows, int64_t columns, Dtype dtype,
                                            const Strided& t, int64_t offset) {
  with_dtype(dtype, [&](auto s) {
    typedef decltype(s) S;
    for (int64_t r = 0; r < rows; ++r) {
      S* const out = (S*)t.data + offset + r * t.position;
      if (t.feature == 1) {
        run_out<C, S>(in + r * ld, columns, out);
        continue;
      }
      for (int64_t n = 0; n < columns; n += kBlock) {
        S lanes[kBlock];
        block_out(in + r * ld + n, lanes);
        for (int64_t i = 0; i < kBlock && n + i < columns; ++i) out[(n + i) * t.feature] = lanes[i];
      }
    }
  });
}

// out[column][row] = in[row][column], with zeros in place of rows up to a multiple of kBlock.
template <class C>
__attribute__((noinline)) void transpose(const C* in, int64_t ld_in, int64_t rows, int64_t columns, C* out,
                                         int64_t ld_out = kStride) {
  constexpr int64_t kSide = 16 / sizeof(C);
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  const int64_t padded_rows = (rows + kBlock - 1) / kBlock * kBlock;
  int64_t done = 0;  // rows
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4)
    if (columns % 16 == 0)
      for (; done + 16 <= rows; done += 16)
        for (int64_t column = 0; column < columns; column += 16)
          transpose_sixteen(in + done * ld_in + column, ld_in, out + column * ld_out + done, ld_out);
#endif
  for (int64_t column = 0; column < whole_columns; column += kSide)
    for (int64_t row = done; row < whole_rows; row += kSide)
      transpose_square(in + row * ld_in + column, ld_in, out + column * ld_out + row, ld_out);
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t row = column < whole_columns ? whole_rows : 0; row < padded_rows; ++row)
      out[column * ld_out + row] = row < rows ? in[row * ld_in + column] : C(0);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
