// The matrix units of a warp: 8 x 8 matrices of 16-bit elements from shared memory, and products of them.
//
// Lane l has the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of each 8 x 8 part of an operand or a result.
#pragma once

#include "values.cuh"

namespace fusednorm_cuda {

#if defined(__CUDACC__)

// The value of another lane.
template <class V>
FN_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(kEveryLane, value, lane);
}

// A barrier, and whether any thread of the block says yes.
FN_DEVICE bool sync_threads_or(bool yes) { return __syncthreads_or(yes); }

// Rounded by itself, whatever is added to it.
FN_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

FN_DEVICE float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four matrices, each of eight rows of 16 bytes: lane 8 m + r says where row r of matrix m lies.
template <bool TRANSPOSED>
FN_DEVICE void load_matrices(const Shared<uint4>& memory, int i, uint32_t (&to)[4]) {
  const unsigned address = memory.address(i);
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

// Volatile, so that no compiler moves it to where a part of the warp goes.
//
// sum += a b, of 16 x 16 and 16 x 8. Parts of a: rows 0 to 7, the others, and both again for columns from 8 on; of b,
// which is given by columns: rows 0 to 7, the others; of sum: rows 0 to 7, the others.
FN_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FN_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

template <class V>
V shuffle(V value, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(V) == 4);
  return bit_cast<V>(Machine::get().exchange({bit_cast<uint32_t>(value)}, {file, line})[lane][0]);
}

inline bool sync_threads_or(bool yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return Machine::get().sync_threads_or(yes, {file, line});
}

inline float rounded_product(float a, float b) { return a * b; }
inline float exp2_approximately(float x) { return std::exp2(x); }

// Each lane says where its row lies, and reads what it gets of the others' rows.
template <bool TRANSPOSED>
void load_matrices(const Shared<uint4>& memory, int i, uint32_t (&to)[4], const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  Machine& machine = Machine::get();
  const auto* const rows = machine.exchange({uint32_t(memory.at(i))}, {file, line});
  const unsigned rank = unsigned(cluster_rank());
  const int lane = machine.lane(), part = lane / 4, pair = lane % 4;
  for (int m = 0; m < 4; ++m) {
    if constexpr (TRANSPOSED) {
      const auto element = [&](int row) {
        return uint32_t(machine.shared_read<uint16_t>(rank, rows[8 * m + row][0] + 2 * size_t(part), line));
      };
      to[m] = element(2 * pair) | element(2 * pair + 1) << 16;
    } else {
      to[m] = machine.shared_read<uint32_t>(rank, rows[8 * m + part][0] + 4 * size_t(pair), line);
    }
  }
}

template <class E>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, E element,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  fusednorm_emulation::Words mine;
  for (int w = 0; w < 6; ++w)
    for (int half = 0; half < 2; ++half)
      mine[2 * w + half] = bit_cast<uint32_t>(widened(uint16_t(words[w] >> 16 * half), element));
  const auto* const all = Machine::get().exchange(mine, {file, line});
  const int lane = Machine::get().lane(), part = lane / 4, pair = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * pair + i % 2, lower = i / 2;
    float total = 0;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2, right = k / 8, half = k % 2;
      total += bit_cast<float>(all[4 * part + from][2 * (lower + 2 * right) + half]) *
               bit_cast<float>(all[4 * column + from][2 * (4 + right) + half]);
    }
    sum[i] += total;
  }
}

#endif

}  // namespace fusednorm_cuda
