// From a call to a grid: the launches of one dtype.
#pragma once

#include <type_traits>

#include "../support/launch.cuh"
#include "attention_backward_keys.cuh"
#include "attention_backward_mask.cuh"
#include "attention_forward.cuh"
#include "attention_launch.h"

namespace fusednorm_cuda {

// f(columns): head dims up to 64, to 128 and to 256 share kernels, whose tiles end with zeros.
template <class F>
auto with_columns(const Attention& a, const F& f) {
  const int most = a.dim > a.value_dim ? a.dim : a.value_dim;
  if (most <= 64) return f(std::integral_constant<int, 64>{});
  if (most <= 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 256>{});
}

inline int64_t tiles_in(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class S>
void launch_tiles(void (*kernel)(const Attention), Attention& a, int64_t positions, int64_t heads, void* cuda_stream) {
  const int64_t tiles = tiles_in(positions, S::kRows), blocks = tiles * heads * a.n_batches;
  if (blocks > INT32_MAX) throw std::runtime_error("attention: more tiles than a launch has blocks");
  a.n_tiles = int(tiles);
  launch<const Attention>(kernel, a, {blocks, 1, S::kThreads, 1, 1, S::kSharedBytes}, cuda_stream);
}

// float32 has one body: outside the matrix units a mask costs next to nothing
template <class E>
AttentionLaunchers attention_launchers() {
  constexpr bool kOnlyGeneral = sizeof(E) == 4;
  AttentionLaunchers of;
  of.forward = [](Attention& a, bool general, void* cuda_stream) {
    with_columns(a, [&](auto columns) {
      using S = Shape<sizeof(E), columns, false>;
      const auto kernel = general ? attention_fwd_kernel<E, columns, true, S> : attention_fwd_kernel<E, columns, kOnlyGeneral, S>;
      launch_tiles<S>(kernel, a, a.n_queries, a.n_heads, cuda_stream);
    });
  };
  of.queries = [](Attention& a, bool general, void* cuda_stream) {
    with_columns(a, [&](auto columns) {
      using S = Shape<sizeof(E), columns, true>;
      const auto kernel =
          general ? attention_bwd_dq_kernel<E, columns, true, S> : attention_bwd_dq_kernel<E, columns, kOnlyGeneral, S>;
      launch_tiles<S>(kernel, a, a.n_queries, a.n_heads, cuda_stream);
    });
  };
  of.keys = [](Attention& a, bool general, void* cuda_stream) {
    with_columns(a, [&](auto columns) {
      using S = Shape<sizeof(E), columns, true>;
      const auto kernel =
          general ? attention_bwd_dkv_kernel<E, columns, true, S> : attention_bwd_dkv_kernel<E, columns, kOnlyGeneral, S>;
      const Operand dk = a.dk, dv = a.dv;
      if (S::kBoth || !dk.data || !dv.data) return launch_tiles<S>(kernel, a, a.n_keys, a.n_key_heads, cuda_stream);
      a.dv.data = nullptr;
      launch_tiles<S>(kernel, a, a.n_keys, a.n_key_heads, cuda_stream);
      a.dk.data = nullptr, a.dv = dv;
      launch_tiles<S>(kernel, a, a.n_keys, a.n_key_heads, cuda_stream);
      a.dk = dk;
    });
  };
  of.mask_blocks = [](const Attention& a, int64_t& tiles) {
    return with_columns(a, [&](auto columns) {
      using S = Shape<sizeof(E), columns, true>;
      const int64_t planes = int64_t(a.mask_batches) * a.mask_heads, own = tiles_in(a.mask_queries, S::kRows);
      tiles = int64_t(a.n_batches) * a.n_heads / planes * (tiles_in(a.n_queries, S::kRows) / own);
      return planes * own * tiles_in(a.n_keys, S::kTile);
    });
  };
  of.mask = [](Attention& a, void* cuda_stream) {
    with_columns(a, [&](auto columns) {
      using S = Shape<sizeof(E), columns, true>;
      int64_t tiles;
      const int64_t blocks = attention_launchers<E>().mask_blocks(a, tiles) * a.splits;
      if (blocks > INT32_MAX) throw std::runtime_error("attn_mask: more tiles than a launch has blocks");
      launch<const Attention>(attention_bwd_dmask_kernel<E, columns, S>, a, {blocks, 1, S::kThreads, 1, 1, S::kSharedBytes},
                              cuda_stream);
    });
  };
  return of;
}

}  // namespace fusednorm_cuda
