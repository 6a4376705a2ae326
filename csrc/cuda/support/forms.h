// How threads, blocks and tiles may share a row of n columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"

namespace fusednorm_cuda {

// What the choice depends on besides the row. Tests shrink the thread counts, so that small rows reach every form.
struct Limits {
  int forward_threads = 128;   // of a block, for each vector a thread holds
  int backward_threads = 512;  // of a block
  int clusters = 1;            // most blocks of a cluster; 1 where there are none
  int processors = 1;
  bool early = false;  // a kernel may stand ready while the one before it ends
  int shared_bytes = 228 << 10;  // of a multiprocessor
};

constexpr int64_t kMostColumns = int64_t(1) << 30;  // a column and a tile past it fit in an int
constexpr int kWarpLanes = 32;
constexpr int kProgramsPerProcessor = 8;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// Threads that hold `vectors` vectors, one each: a power of two within a warp, else whole warps.
inline int64_t threads_for(int64_t vectors) {
  return vectors <= kWarpLanes ? power_of_two(std::max<int64_t>(vectors, 1)) : ceil_div(vectors, kWarpLanes) * kWarpLanes;
}

// A row over as few blocks as hold it, else over as many as there may be, in tiles (or, backward, in slabs).
inline Form spread(int64_t n, int vector, int chunks, int most_threads, int most_ranks) {
  const int64_t vectors = ceil_div(n, int64_t(vector) * chunks);
  int64_t ranks = 1;
  while (ranks < most_ranks && threads_for(ceil_div(vectors, ranks)) > most_threads) ranks *= 2;
  const int64_t threads = std::min<int64_t>(threads_for(ceil_div(vectors, ranks)), most_threads);
  Form form{};
  form.chunks = chunks;
  form.threads = int(ranks == 1 ? threads : std::max<int64_t>(threads, kWarpLanes));
  form.rows = 1;
  form.ranks = int(ranks);
  form.tiles = int(ceil_div(n, ranks * form.threads * int64_t(vector) * chunks));
  return form;
}

// Groups of blocks that fill the multiprocessors at a time.
inline int64_t resident_programs(const Form& form, int registers, int shared_bytes, const Limits& limits) {
  constexpr int kReserved = 1024;  // of shared memory, for each block
  const int fitting = std::min(65536 / (registers * form.threads * form.rows), limits.shared_bytes / (shared_bytes + kReserved));
  const int64_t blocks = int64_t(limits.processors) * std::max(1, std::min(fitting, kProgramsPerProcessor));
  return std::max<int64_t>(1, blocks / (int64_t(form.ranks) * form.tiles));
}

// Blocks that visit the rows in turns: the multiprocessors filled, but no more than there are groups of rows.
inline int programs_for(int64_t n_rows, const Form& form, int registers, int shared_bytes, const Limits& limits) {
  const int64_t resident = resident_programs(form, registers, shared_bytes, limits);
  return int(std::min<int64_t>({resident, ceil_div(n_rows, form.rows), 65535}));
}

}  // namespace fusednorm_cuda
