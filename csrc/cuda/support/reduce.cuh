// Sums over the threads that share a row: lanes of a warp, warps of a block, blocks of a cluster.
#pragma once

#include "device.cuh"

namespace fusednorm_cuda {

constexpr int kWarp = 32, kHalf = kWarp / 2, kMaxWarps = kHalf;  // of a block
constexpr int kMaxRanks = 8;  // of a cluster; and rows of a block, where one takes more than a warp
constexpr int kMaxSums = 2;  // taken together: half the barriers

// Every thread of the row gets the same bits, in every run: sums are taken in an order that the form alone decides.
template <class C>
class RowGroup {
 public:
  static constexpr int kSlots = kMaxSums * kMaxRanks * kMaxWarps;
  static constexpr int kMBarriers = 2 * kSlots * int(sizeof(C));  // two turns: see below
  static constexpr int kSharedBytes = kMBarriers + 2 * MBarrier::kBytes;

  FN_DEVICE explicit RowGroup(int threads)
      : lanes_(threads < kWarp ? threads : kWarp), warps_((threads + kWarp - 1) / kWarp), ranks_(cluster_size()) {
    if (ranks_ == 1) return;
    if (threadIdx.x == 0) MBarrier(kMBarriers).start(), MBarrier(kMBarriers + MBarrier::kBytes).start();
    cluster_arrive();
  }

  // Where a row takes more than a warp it must be its block's only one.
  FN_DEVICE void sum(C (&values)[1]) {
    for (int offset = lanes_ / 2; offset > 0; offset /= 2) values[0] += shuffle_xor(values[0], offset);
    if (warps_ * ranks_ == 1) return;
    values[0] = gathered<1>(values[0], 0);
    add_half(values[0]);
  }

  // Two sums at the price of one: each half of a warp goes on with one of them.
  FN_DEVICE void sum(C (&values)[2]) {
    if (lanes_ < kWarp) {  // other rows are in this warp, and no other warp has a part of this row
#pragma unroll 1
      for (int offset = lanes_ / 2; offset > 0; offset /= 2) {
        values[0] += shuffle_xor(values[0], offset);
        values[1] += shuffle_xor(values[1], offset);
      }
      return;
    }
    const bool upper = lane() >= kHalf;
    const C given = upper ? values[0] : values[1];
    C mine = (upper ? values[1] : values[0]) + shuffle_xor(given, kHalf);
    add_half(mine);
    if (warps_ * ranks_ > 1) {
      mine = gathered<2>(mine, upper);
      add_half(mine);
    }
    const C other = shuffle_xor(mine, kHalf);
    values[0] = upper ? other : mine;
    values[1] = upper ? mine : other;
  }

 private:
  FN_DEVICE static int lane() { return int(threadIdx.x) % kWarp; }

  FN_DEVICE static void add_half(C& value) {
#pragma unroll
    for (int offset = kHalf / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  }

  // What each warp of each block has of sum k of SUMS, added over blocks, a warp a lane of each half. Every lane of a
  // half has its warp's `value`.
  //
  // A slot is written again two rounds later. Between lies the round in which all have heard from all, and who speaks there
  // has read the round before: one wait a round is enough.
  template <int SUMS>
  FN_DEVICE C gathered(C value, int k) {
    const int turn = round_ & 1, self = lane() % kHalf, first = k * kMaxRanks * kMaxWarps;
    const Shared<C> slots(turn * kSlots * int(sizeof(C)));
    const int warp = int(threadIdx.x) / kWarp;
    const bool speaks = lane() < SUMS * kHalf;
    C total = 0;
    if (ranks_ == 1) {  // a row of the block has the slots that a block of a cluster has; single sums are of one row
      const int row = first + (SUMS == 1 ? 0 : int(threadIdx.y) * kMaxWarps);
      if (speaks && self == 0) slots.set(row + warp, value);
      sync_threads();
      if (self < warps_) total = slots.get(row + self);
    } else {
      const int mine = first + cluster_rank() * kMaxWarps + warp;
      if (round_ == 0) cluster_wait();
      const MBarrier arrivals(kMBarriers + turn * MBarrier::kBytes);
      if (threadIdx.x == 0) arrivals.expect(SUMS * ranks_ * warps_ * int(sizeof(C)));
      if (speaks && self < ranks_) slots.send(self, mine, value, arrivals);
      arrivals.wait(round_ & 2);
      C parts[kMaxRanks];  // all on their way at once
#pragma unroll
      for (int rank = 0; rank < kMaxRanks; ++rank)
        parts[rank] = self < warps_ && rank < ranks_ ? slots.get(first + rank * kMaxWarps + self) : C(0);
#pragma unroll
      for (int rank = 0; rank < kMaxRanks; ++rank) total += parts[rank];
    }
    ++round_;
    return total;
  }

  int lanes_, warps_, ranks_, round_ = 0;
};

}  // namespace fusednorm_cuda
