// Tiles of rows in shared memory, and a warp's products of them.
//
// A warp has 16 rows of logits or of a result. Lane l has of each 8 columns the elements (l / 4, 2 (l % 4)), the one beside
// it, and both again eight rows further down. 16-bit products are the matrix units'; float32 ones are sums of FMAs.
#pragma once

#include "../support/warpgroup.cuh"
#include "attention_args.h"

namespace fusednorm_cuda {

constexpr int kWarpRows = 16;

struct Lane {
  int thread, warp, lane, row, pair;  // row, and column / 2, of its first element of 8 x 8
  FN_DEVICE explicit Lane(int index) : thread(index), warp(thread / 32), lane(thread % 32), row(lane / 4), pair(lane % 4) {}
};

// Rows of one head in global memory.
struct GlobalRows {
  const char* data;
  int64_t stride, feature;
  int n, columns;
  bool aligned;
  const char* shown;  // a key mask, or null: rows that it hides are read as zeros
  int64_t shown_stride;
};

FN_DEVICE GlobalRows rows_of(const Operand& o, int64_t batch, int64_t head, int64_t first, int n, int columns) {
  return {o.data + batch * o.batch + head * o.head + first * o.position, o.position, o.feature, n, columns, o.aligned, nullptr, 0};
}

// Whether products use `wgmma`: 16-bit elements, on sm_90a.
template <class E>
constexpr bool kOfWarpgroups = kHasWarpgroups && sizeof(E) == 2;

// `offset` bytes into shared memory. Eight rows lie in different banks. So a row is DIM elements and 16 bytes more, or, for
// `wgmma`, is swizzled as `GroupOperand` says.
template <class E, int DIM>
struct Tile {
  static constexpr int kVector = 16 / sizeof(E), kChunks = DIM / kVector, kPitch = kChunks + (kOfWarpgroups<E> ? 0 : 1);
  static constexpr int kRowBytes = 16 * kPitch;
  int offset;

  // Where a row's vector of 16 bytes is.
  FN_DEVICE static int at(int row, int chunk) {
    if constexpr (kOfWarpgroups<E>)
      return row / 8 * 8 * kChunks + chunk / 8 * 64 + row % 8 * 8 + (chunk % 8 ^ row % 8);
    else
      return row * kPitch + chunk;
  }
  // The operand from a row and column on: multiples of 8 and of 16.
  FN_DEVICE GroupOperand operand(int row, int column) const {
    static_assert(8 * kRowBytes % 1024 == 0);
    return {offset + row * kRowBytes + column / 64 * 1024 + column % 64 * 2, 8 * kRowBytes, 1024};
  }
  FN_DEVICE Tile below(int rows) const { return {offset + rows * kRowBytes}; }
  FN_DEVICE Shared<uint4> vectors() const { return Shared<uint4>(offset); }

  // Rows first to first + ROWS by all threads; zeros where there are none. To be committed and waited for.
  template <int ROWS, int THREADS>
  FN_DEVICE void fill(const GlobalRows& from, int first) const {
    static_assert(THREADS % kChunks == 0 && ROWS * kChunks % THREADS == 0);
    constexpr int kStep = THREADS / kChunks;
    const int thread = thread_again();
    const int row = thread / kChunks, chunk = thread % kChunks, column = chunk * kVector;
    const auto there = [&](int position) {
      return position < from.n && !(from.shown && from.shown[position * from.shown_stride] == 0);
    };
    if (from.aligned) {
      const char* const begin = from.data + column * int(sizeof(E));
      const bool inside = column < from.columns;
#pragma unroll 4
      for (int r = 0; r < ROWS; r += kStep) {
        const int position = first + row + r;
        const bool copied = inside && there(position);
        vectors().copy(at(row + r, chunk), copied ? begin + position * from.stride : from.data, copied);
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < ROWS; r += kStep) {
        const int position = first + row + r;
        const int columns = there(position) ? from.columns : 0;
        vectors().set(at(row + r, chunk), gathered(from.data + (columns ? position * from.stride : 0), from.feature, column, columns));
      }
    }
  }

  // Rows of the tile to a result, by all threads.
  template <int ROWS, int THREADS>
  FN_DEVICE void store(const GlobalRows& to, int first) const {
#pragma unroll 1
    for (int i = thread_again(); i < ROWS * kChunks; i += THREADS) {
      const int row = i / kChunks, column = i % kChunks * kVector;
      if (first + row >= to.n || column >= to.columns) continue;
      char* const begin = const_cast<char*>(to.data) + int64_t(first + row) * to.stride;
      const uint4 vector = vectors().get(at(row, i % kChunks));
      if (to.aligned) {
        *reinterpret_cast<uint4*>(begin + column * int(sizeof(E))) = vector;
        continue;
      }
      Raw<E, kVector> raw;
      raw.set(0, vector);
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (column + e < to.columns) {
          char* const at = begin + (column + e) * to.feature;
          if constexpr (sizeof(E) == 2)
            *reinterpret_cast<uint16_t*>(at) = uint16_t(raw.words[e / 2] >> (e % 2 * 16));
          else
            *reinterpret_cast<uint32_t*>(at) = raw.words[e];
        }
    }
  }

  // A warp's rows, given as numbers: those of the tile that are its own.
  FN_DEVICE void put(const float (&numbers)[DIM / 8][4], const Lane& l, const float (&factors)[2]) const {
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = numbers[n][2 * half] * factors[half], b = numbers[n][2 * half + 1] * factors[half];
        const int row = l.row + 8 * half;
        if constexpr (sizeof(E) == 2) {
          Shared<uint32_t>(offset).set(4 * at(row, n) + l.pair, pack(a, b, E{}));
        } else {
          const uint64_t bits = bit_cast<uint32_t>(a) | uint64_t(bit_cast<uint32_t>(b)) << 32;
          Shared<uint64_t>(offset).set(2 * at(row, 2 * n) + l.pair, bits);
        }
      }
  }

  // The numbers 8 n + 2 pair and the next of a row.
  FN_DEVICE void pair_of(int row, int n, int pair, float (&to)[2]) const {
    if constexpr (sizeof(E) == 2) {
      const uint32_t bits = Shared<uint32_t>(offset).get(4 * at(row, n) + pair);
      to[0] = widened(uint16_t(bits), E{}), to[1] = widened(uint16_t(bits >> 16), E{});
    } else {
      const uint64_t bits = Shared<uint64_t>(offset).get(2 * at(row, 2 * n) + pair);
      to[0] = bit_cast<float>(uint32_t(bits)), to[1] = bit_cast<float>(uint32_t(bits >> 32));
    }
  }

 private:
  // A vector of elements that may lie anywhere.
  FN_DEVICE static uint4 gathered(const char* row, int64_t feature, int column, int columns) {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (column + e < columns) {
        const char* const at = row + (column + e) * feature;
        if constexpr (sizeof(E) == 2)
          words[e / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(at)) << (e % 2 * 16);
        else
          words[e] = *reinterpret_cast<const uint32_t*>(at);
      }
    return {words[0], words[1], words[2], words[3]};
  }
};

template <int N>
FN_DEVICE void clear(float (&numbers)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) numbers[n][e] = 0;
}

// sum = own other^T: of the warp's 16 rows `own` with the first N rows of `other`, by each warp for itself.
template <int N, class E, int DIM>
FN_DEVICE void products_of_warp(float (&sum)[N / 8][4], Tile<E, DIM> own, Tile<E, DIM> other, const Lane& l) {
  using T = Tile<E, DIM>;
  clear(sum);
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < DIM / 16; ++k) {
      uint32_t a[4], b[4];
      load_matrices<false>(own.vectors(), T::at(l.lane % 16, l.lane / 16 + 2 * k), a);
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        load_matrices<false>(other.vectors(), T::at(l.lane % 8 + l.lane / 16 * 8 + 16 * n, l.lane / 8 % 2 + 2 * k), b);
        multiply_add(sum[2 * n], a, b[0], b[1], E{});
        multiply_add(sum[2 * n + 1], a, b[2], b[3], E{});
      }
    }
  } else {
    const auto four = [](T tile, int row, int k, float(&to)[4]) {
      const uint4 v = tile.vectors().get(T::at(row, k));
      to[0] = bit_cast<float>(v.x), to[1] = bit_cast<float>(v.y), to[2] = bit_cast<float>(v.z), to[3] = bit_cast<float>(v.w);
    };
#pragma unroll 2
    for (int k = 0; k < T::kChunks; ++k) {
      float a[2][4], b[4];
      four(own, l.row, k, a[0]);
      four(own, l.row + 8, k, a[1]);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          four(other, 8 * n + 2 * l.pair + c, k, b);
          float upper = 0, lower = 0;  // four by themselves: the sum of all takes fewer roundings
#pragma unroll
          for (int i = 0; i < 4; ++i) upper = fmaf(a[0][i], b[i], upper), lower = fmaf(a[1][i], b[i], lower);
          sum[n][c] += upper, sum[n][2 + c] += lower;
        }
    }
  }
}

// sum = block other^T: of the block's rows, of which this warp has 16, with the first N rows of `other`.
template <int N, class E, int DIM>
FN_DEVICE void products(float (&sum)[N / 8][4], Tile<E, DIM> block, Tile<E, DIM> other, const Lane& l) {
  if constexpr (kOfWarpgroups<E>) {
    begin_group_products();
#pragma unroll
    for (int k = 0; k < DIM; k += 16) group_multiply_add<N>(sum, block.operand(0, k), other.operand(0, k), k > 0, E{});
    end_group_products(sum);
  } else {
    products_of_warp<N>(sum, block.below(kWarpRows * l.warp), other, l);
  }
}

// As `add_products`; operand(k, a) gives a warp's weights for rows 16 k on.
template <int N, class E, int DIM, class F>
FN_DEVICE void add_group_products(float (&sum)[DIM / 8][4], const F& operand, Tile<E, DIM> tile) {
  uint32_t a[N / 16][4];
#pragma unroll
  for (int k = 0; k < N / 16; ++k) operand(k, a[k]);
  begin_group_products(sum, a);
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    group_multiply_add<0>(sum, a[k], tile.operand(16 * k, 0), E{});
    if constexpr (DIM > 64) group_multiply_add<8>(sum, a[k], tile.operand(16 * k, 64), E{});
    if constexpr (DIM > 128) {
      group_multiply_add<16>(sum, a[k], tile.operand(16 * k, 128), E{});
      group_multiply_add<24>(sum, a[k], tile.operand(16 * k, 192), E{});
    }
  }
  end_group_products(sum);
}

// Adds weights tile: of a warp's 16 rows of weights for the N rows of the tile. Bit 4 n + e of `reached` says that element e
// of columns 8 n to 8 n + 7 takes part. Where `careful` what does not is left out, else it is a weight of zero.
template <int N, class E, int DIM>
FN_DEVICE void add_products(float (&sum)[DIM / 8][4], const float (&weights)[N / 8][4], uint32_t reached, bool careful,
                            Tile<E, DIM> tile, const Lane& l) {
  using T = Tile<E, DIM>;
  if constexpr (sizeof(E) == 2) {
    const auto operand = [&](int k, uint32_t(&a)[4]) {
      const auto &left = weights[2 * k], &right = weights[2 * k + 1];
      a[0] = pack(left[0], left[1], E{}), a[1] = pack(left[2], left[3], E{});
      a[2] = pack(right[0], right[1], E{}), a[3] = pack(right[2], right[3], E{});
    };
    if constexpr (kOfWarpgroups<E>) {
      if (!careful) return add_group_products<N>(sum, operand, tile);
    } else if (!careful) {
#pragma unroll
      for (int k = 0; k < N / 16; ++k) {
        uint32_t a[4], b[4];
        operand(k, a);
#pragma unroll
        for (int n = 0; n < DIM / 16; ++n) {
          load_matrices<true>(tile.vectors(), T::at(l.lane % 16 + 16 * k, l.lane / 16 + 2 * n), b);
          multiply_add(sum[2 * n], a, b[0], b[1], E{});
          multiply_add(sum[2 * n + 1], a, b[2], b[3], E{});
        }
      }
      return;
    }
  }
  // Columns 8 n + 2 pair of the weights and the next are the lane's that has this pair. A loop that is not unrolled, for
  // few registers: beside the matrix units it is the rare path.
#pragma unroll 1
  for (int step = 0; step < N / 2; ++step) {
    const int own = step / 4, pair = step % 4, from = l.lane - l.pair + pair;
    const uint32_t bits = shuffle(reached, from) >> (4 * own);
    float mine[4] = {0, 0, 0, 0};
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[e] = n == own ? weights[n][e] : mine[e];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float upper = shuffle(mine[j], from), lower = shuffle(mine[2 + j], from);
      if constexpr (sizeof(E) == 2) {
        const uint32_t rounded = pack(upper, lower, E{});
        upper = widened(uint16_t(rounded), E{}), lower = widened(uint16_t(rounded >> 16), E{});
      }
      const bool upper_is = bits >> j & 1, lower_is = bits >> (2 + j) & 1;
#pragma unroll
      for (int c = 0; c < DIM / 8; ++c) {
        float v[2];
        tile.pair_of(8 * own + 2 * pair + j, c, l.pair, v);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (upper_is) sum[c][i] = fmaf(upper, v[i], sum[c][i]);
          if (lower_is) sum[c][2 + i] = fmaf(lower, v[i], sum[c][2 + i]);
        }
      }
    }
  }
}

}  // namespace fusednorm_cuda
