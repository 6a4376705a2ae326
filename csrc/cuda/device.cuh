// What the kernels take from the machine they run on: CUDA under nvcc, `../emulation` under a host compiler.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FN_DEVICE __device__ __forceinline__
#define FN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FN_ARGUMENT __grid_constant__ const

namespace fusednorm_cuda {

constexpr unsigned kEveryLane = 0xffffffffu;

FN_DEVICE void sync_threads() { __syncthreads(); }

// The barrier also orders accesses to the shared memory of the other blocks. Without clusters there is but one block.
FN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

FN_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return int(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}

FN_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return int(__clusterSizeInBlocks());
#else
  return 1;
#endif
}

template <class V>
FN_DEVICE V shuffle_xor(V value, int offset) {
  return __shfl_xor_sync(kEveryLane, value, offset);
}

extern __shared__ __align__(16) char shared_memory[];

// An array in the block's dynamic shared memory, `offset` bytes in.
template <class V>
class Shared {
 public:
  FN_DEVICE explicit Shared(int offset) : data_(reinterpret_cast<V*>(shared_memory + offset)) {}
  FN_DEVICE V get(int i) const { return data_[i]; }
  FN_DEVICE void set(int i, V value) const { data_[i] = value; }
  // In the shared memory of another block of the cluster.
  FN_DEVICE void set_in([[maybe_unused]] int rank, int i, V value) const {
#if __CUDA_ARCH__ >= 900
    *static_cast<V*>(__cluster_map_shared_rank(data_ + i, rank)) = value;
#else
    data_[i] = value;
#endif
  }

 private:
  V* data_;
};

}  // namespace fusednorm_cuda

#else

#include <cmath>
#include <cstring>

#include "../emulation/emulation.h"

#define FN_DEVICE inline
#define FN_KERNEL(threads, blocks) void
#define FN_ARGUMENT const
#define threadIdx (fusednorm_emulation::Machine::get().thread_index())
#define blockIdx (fusednorm_emulation::Machine::get().block_index())
#define blockDim (fusednorm_emulation::Machine::get().block_dimension())
#define gridDim (fusednorm_emulation::Machine::get().grid_dimension())

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

namespace fusednorm_cuda {

using fusednorm_emulation::Machine;

constexpr unsigned kEveryLane = 0xffffffffu;

inline void sync_threads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Machine::get().sync_threads({file, line});
}
inline void sync_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Machine::get().sync_cluster({file, line});
}
inline int cluster_rank() { return int(Machine::get().cluster_rank()); }
inline int cluster_size() { return int(Machine::get().cluster_size()); }

template <class V>
V shuffle_xor(V value, int offset, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = Machine::get().shuffle_xor(kEveryLane, bits, offset, {file, line});
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

template <class V>
class Shared {
 public:
  explicit Shared(int offset) : offset_(size_t(offset)) {}
  V get(int i, int line = __builtin_LINE()) const {
    return Machine::get().shared_read<V>(unsigned(cluster_rank()), at(i), line);
  }
  void set(int i, V value, int line = __builtin_LINE()) const { set_in(cluster_rank(), i, value, line); }
  void set_in(int rank, int i, V value, int line = __builtin_LINE()) const {
    Machine::get().shared_write(unsigned(rank), at(i), value, line);
  }

 private:
  size_t at(int i) const { return offset_ + size_t(int64_t(i)) * sizeof(V); }
  size_t offset_;
};

}  // namespace fusednorm_cuda

#endif
