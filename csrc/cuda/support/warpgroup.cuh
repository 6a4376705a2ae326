// Products of a warpgroup, four warps, by `wgmma` (sm_90a). The second operand is read from shared memory once for all four.
// Warp w has rows 16 w to 16 w + 15 of a result, in registers as after `multiply_add`.
#pragma once

#include <type_traits>

#include "matrix.cuh"

namespace fusednorm_cuda {

constexpr int kGroupWarps = 4;

// A matrix of 16-bit elements in shared memory, in the 128-byte swizzle. Groups of eight rows of 128 bytes begin at multiples
// of 1024 bytes. Vector v of row r, 16 bytes, is stored at v ^ (r % 8).
struct GroupOperand {
  int offset;   // bytes into shared memory of its first element
  int rows;     // stride byte offset: from eight rows to the next eight
  int columns;  // leading byte offset: from 64 columns to the next 64; unused, since no operand has more
};

#if defined(__CUDACC__)

FN_DEVICE uint64_t descriptor(const GroupOperand& o) {
  const uint64_t address = (shared_address(shared_memory) + o.offset) & 0x3ffff;
  return address >> 4 | uint64_t(o.columns >> 4) << 16 | uint64_t(o.rows >> 4) << 32 | uint64_t(1) << 62;
}

// The compiler moves no write of these registers to after this place, and no read of them to before it.
template <int M>
FN_DEVICE void pin(float (&of)[M][4]) {
#pragma unroll
  for (int n = 0; n < M; ++n)
    asm volatile("" : "+f"(of[n][0]), "+f"(of[n][1]), "+f"(of[n][2]), "+f"(of[n][3])::"memory");
}
template <int M>
FN_DEVICE void pin(uint32_t (&of)[M][4]) {
#pragma unroll
  for (int n = 0; n < M; ++n)
    asm volatile("" : "+r"(of[n][0]), "+r"(of[n][1]), "+r"(of[n][2]), "+r"(of[n][3])::"memory");
}

// Orders earlier writes of registers before `wgmma`, which reads them until `end_group_products`.
FN_DEVICE void begin_group_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int M, int K>
FN_DEVICE void begin_group_products(float (&sum)[M][4], uint32_t (&a)[K][4]) {
  pin(sum);
  pin(a);
  begin_group_products();
}

// Waits for the products begun, whose sum is `sum`.
template <int M>
FN_DEVICE void end_group_products(float (&sum)[M][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(sum);
}

#define FN_ROW(n) "+f"(sum[FIRST + n][0]), "+f"(sum[FIRST + n][1]), "+f"(sum[FIRST + n][2]), "+f"(sum[FIRST + n][3])
#define FN_ROWS_16 FN_ROW(0), FN_ROW(1)
#define FN_ROWS_32 FN_ROWS_16, FN_ROW(2), FN_ROW(3)
#define FN_ROWS_64 FN_ROWS_32, FN_ROW(4), FN_ROW(5), FN_ROW(6), FN_ROW(7)
#define FN_SUM_16 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define FN_SUM_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define FN_SUM_64                                                                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31}"
// a and b by descriptor
#define FN_PRODUCT_OF_SHARED(N, TYPE, A, B, ADDS)                                                                        \
  asm volatile("{.reg .pred adds; setp.ne.b32 adds, " ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE   \
               "." TYPE " " FN_SUM_##N ", " A ", " B ", adds, 1, 1, 0, 0;}"                                              \
               : FN_ROWS_##N                                                                                             \
               : "l"(a), "l"(b), "r"(int(adds))                                                                          \
               : "memory")
// a in registers, b by descriptor and transposed
#define FN_PRODUCT_OF_REGISTERS(N, TYPE, A, B)                                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " FN_SUM_##N ", {" A "}, " B            \
               ", 1, 1, 1, 1;"                                                                                           \
               : FN_ROWS_##N                                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                      \
               : "memory")
#define FN_OF_EITHER_TYPE(PRODUCT, N, ...)  \
  if constexpr (std::is_same_v<E, BFloat16>) \
    PRODUCT(N, "bf16", __VA_ARGS__);         \
  else                                       \
    PRODUCT(N, "f16", __VA_ARGS__)

// sum += own other^T, of 64 x 16 and N x 16. Unless `adds`, the old sum is ignored.
template <int N, class E>
FN_DEVICE void group_multiply_add(float (&sum)[N / 8][4], const GroupOperand& own, const GroupOperand& other, bool adds, E) {
  constexpr int FIRST = 0;
  const uint64_t a = descriptor(own), b = descriptor(other);
  static_assert(N == 16 || N == 32 || N == 64);
  if constexpr (N == 16) {
    FN_OF_EITHER_TYPE(FN_PRODUCT_OF_SHARED, 16, "%8", "%9", "%10");
  } else if constexpr (N == 32) {
    FN_OF_EITHER_TYPE(FN_PRODUCT_OF_SHARED, 32, "%16", "%17", "%18");
  } else {
    FN_OF_EITHER_TYPE(FN_PRODUCT_OF_SHARED, 64, "%32", "%33", "%34");
  }
}

// sum[FIRST .. FIRST + 7] += a other: a is 64 x 16, in registers, and other 16 x 64, in shared memory.
template <int FIRST, int M, class E>
FN_DEVICE void group_multiply_add(float (&sum)[M][4], const uint32_t (&a)[4], const GroupOperand& other, E) {
  const uint64_t b = descriptor(other);
  FN_OF_EITHER_TYPE(FN_PRODUCT_OF_REGISTERS, 64, "%32, %33, %34, %35", "%36");
}

#undef FN_OF_EITHER_TYPE
#undef FN_PRODUCT_OF_REGISTERS
#undef FN_PRODUCT_OF_SHARED
#undef FN_SUM_64
#undef FN_SUM_32
#undef FN_SUM_16
#undef FN_ROWS_64
#undef FN_ROWS_32
#undef FN_ROWS_16
#undef FN_ROW

#else

inline void begin_group_products(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Machine::get().meet_group(kGroupWarps, {file, line});
}
template <int M, int K>
void begin_group_products(float (&)[M][4], uint32_t (&)[K][4], const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  begin_group_products(file, line);
}
template <int M>
void end_group_products(float (&)[M][4], const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Machine::get().meet_group(kGroupWarps, {file, line});
}

// The element that lies in a row and column of the operand's memory.
template <class E>
float group_element(const GroupOperand& o, int row, int column, E element, int line) {
  const int by_row = row / 8 * o.rows + row % 8 * 128, by_column = column / 64 * o.columns + column % 64 * 2;
  const size_t plain = size_t(o.offset + by_row + by_column), at = plain ^ (plain >> 7 & 7) << 4;
  return widened(Machine::get().shared_read<uint16_t>(unsigned(cluster_rank()), at, line), element);
}

template <int N, class E>
void group_multiply_add(float (&sum)[N / 8][4], const GroupOperand& own, const GroupOperand& other, bool adds, E element,
                        int line = __builtin_LINE()) {
  Machine& machine = Machine::get();
  const int warp = int(threadIdx.x) / 32, lane = machine.lane();
  for (int n = 0; n < N / 8; ++n)
    for (int e = 0; e < 4; ++e) {
      const int row = 16 * warp + lane / 4 + 8 * (e / 2), column = 8 * n + 2 * (lane % 4) + e % 2;
      float total = 0;
      for (int k = 0; k < 16; ++k)
        total += group_element(own, row, k, element, line) * group_element(other, column, k, element, line);
      sum[n][e] = adds ? sum[n][e] + total : total;
    }
}

template <int FIRST, int M, class E>
void group_multiply_add(float (&sum)[M][4], const uint32_t (&a)[4], const GroupOperand& other, E element,
                        const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Machine& machine = Machine::get();
  const auto* const all = machine.exchange({a[0], a[1], a[2], a[3]}, {file, line});
  const int lane = machine.lane(), row = lane / 4, pair = lane % 4;
  float own[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      own[half][k] = widened(uint16_t(all[4 * row + k % 8 / 2][k / 8 * 2 + half] >> k % 2 * 16), element);
  for (int n = 0; n < 8; ++n)
    for (int j = 0; j < 2; ++j) {
      float column[16];
      for (int k = 0; k < 16; ++k) column[k] = group_element(other, k, 8 * n + 2 * pair + j, element, line);
      for (int half = 0; half < 2; ++half) {
        float total = 0;
        for (int k = 0; k < 16; ++k) total += own[half][k] * column[k];
        sum[FIRST + n][2 * half + j] += total;
      }
    }
}

#endif

}  // namespace fusednorm_cuda
