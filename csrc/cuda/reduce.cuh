// Sums over the threads that share a row: lanes of a warp, warps of a block, blocks of a cluster.
#pragma once

#include "device.cuh"

namespace fusednorm_cuda {

constexpr int kWarp = 32, kMaxWarps = 16, kMaxRanks = 8;
constexpr int kMaxSums = 2;  // taken together: half the barriers

// Every thread of the row gets the same bits, in every run: sums are taken in an order that the form alone decides.
template <class C>
class RowGroup {
 public:
  static constexpr int kWarpSlots = kMaxSums * kMaxWarps, kRankSlots = kMaxSums * kMaxRanks;
  static constexpr int kSharedBytes = 2 * (kWarpSlots + kRankSlots) * sizeof(C);  // two turns: see below

  FN_DEVICE explicit RowGroup(int threads) : lanes_(threads < kWarp ? threads : kWarp), warps_(threads / kWarp) {
    if (cluster_size() > 1) sync_cluster();  // every block has started: its shared memory may be written
  }

  // A slot is written again two turns later. Between lies the barrier of the turn between, and who has passed that one
  // knows that all have read: one barrier a turn is enough.
  template <int K>
  FN_DEVICE void sum(C (&values)[K]) {
    static_assert(K <= kMaxSums);
    add_lanes(values, lanes_ / 2);
    if (warps_ > 1) {
      const Shared<C> slots(turn_ * kWarpSlots * int(sizeof(C)));
      const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) slots.set(k * kMaxWarps + warp, values[k]);
      }
      sync_threads();
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] = lane < warps_ ? slots.get(k * kMaxWarps + lane) : C(0);
      add_lanes(values, kMaxWarps);
    }
    if (cluster_size() > 1) add_ranks(values);
    turn_ ^= 1;
  }

 private:
  template <int K>
  FN_DEVICE static void add_lanes(C (&values)[K], int first_offset) {
    for (int offset = first_offset; offset > 0; offset /= 2) {
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] += shuffle_xor(values[k], offset);
    }
  }

  template <int K>
  FN_DEVICE void add_ranks(C (&values)[K]) {
    const int rank = cluster_rank(), ranks = cluster_size();
    const Shared<C> slots((2 * kWarpSlots + turn_ * kRankSlots) * int(sizeof(C)));
    if (int(threadIdx.x) < ranks) {
#pragma unroll
      for (int k = 0; k < K; ++k) slots.set_in(int(threadIdx.x), k * kMaxRanks + rank, values[k]);
    }
    sync_cluster();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      values[k] = C(0);
      for (int r = 0; r < ranks; ++r) values[k] += slots.get(k * kMaxRanks + r);
    }
  }

  int lanes_, warps_, turn_ = 0;
};

}  // namespace fusednorm_cuda
