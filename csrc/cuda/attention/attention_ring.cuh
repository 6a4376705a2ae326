// A block's way over the tiles that its own rows are multiplied with.
#pragma once

#include "attention_shape.h"
#include "attention_tile.cuh"

namespace fusednorm_cuda {

// Two tiles at a time of a block's way over them; while one pair is computed with, the next is on its way.
template <class E, int DIM, class S>
struct Ring {
  static_assert(!kOfWarpgroups<E> || S::kWarps == kGroupWarps);
  static constexpr int kStageBytes = 2 * S::kTile * Tile<E, DIM>::kRowBytes;
  int offset, stage = 0;

  FN_DEVICE Tile<E, DIM> first(int ahead) const { return {offset + (stage ^ ahead) * kStageBytes}; }
  FN_DEVICE Tile<E, DIM> second(int ahead) const { return first(ahead).below(S::kTile); }

  // step(i) for begin to end, with `load(i, pair)` before each. All that was loaded before is there too.
  template <class Load, class Step>
  FN_DEVICE void over(int begin, int end, const Load& load, const Step& step) {
    if (begin < end) load(begin, 0);
    commit_copies();
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      wait_copies<0>();
      if constexpr (kOfWarpgroups<E>) fence_for_warpgroups();
      sync_threads();  // the copies of all; and nobody reads the other pair any more
      if (S::kStages == 2) {
        if (i + 1 < end) load(i + 1, 1);
        commit_copies();
      }
      step(i);
      if (S::kStages == 2) {
        stage ^= 1;
      } else if (i + 1 < end) {
        sync_threads();
        load(i + 1, 0);
        commit_copies();
      }
    }
    wait_copies<0>();
  }
};

}  // namespace fusednorm_cuda
