// How much of a head a block has, and how many tiles are on their way.
#pragma once

namespace fusednorm_cuda {

// Of a head of up to DIM columns, with elements of ITEM bytes. 99 KiB of shared memory, that of desktop GPUs, hold them.
template <int ITEM, int DIM, bool BACKWARD>
struct Shape {
  static constexpr int kRow = ITEM * DIM;  // bytes
  static constexpr int kWarps = kRow >= 1024 ? 2 : 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kTile = BACKWARD ? (kRow >= 512 ? 16 : 32) : (kRow >= 1024 ? 16 : kRow >= 256 ? 32 : 64);
  static constexpr int kStages = BACKWARD && kRow >= 1024 ? 1 : 2;
  static constexpr int kOwn = BACKWARD ? 2 : 1;  // tiles of its own
  static constexpr int kSharedRows = kOwn * kRows + kStages * 2 * kTile;
  static constexpr int kSharedBytes = kSharedRows * (kRow + 16);
  static_assert(kSharedBytes <= 99 << 10);
  static constexpr bool kBoth = DIM <= 128;  // gradients of keys and values at once: their sums are half of all registers
};

}  // namespace fusednorm_cuda
