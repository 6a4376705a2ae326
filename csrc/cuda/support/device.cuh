// What the kernels take from the machine they run on: CUDA under nvcc, `csrc/emulation` under a host compiler.
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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kSinceHopper = false;
#else
constexpr bool kSinceHopper = true;
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;  // `warpgroup.cuh`
#else
constexpr bool kHasWarpgroups = false;
#endif

FN_DEVICE void sync_threads() { __syncthreads(); }

// The compiler moves no access to memory across.
FN_DEVICE void compiler_fence() { asm volatile("" ::: "memory"); }

// Every block of the cluster has started, and its `MBarrier` too: asked for early, for what is loaded meanwhile. It orders
// no other memory.
FN_DEVICE void cluster_arrive() {
  if constexpr (kSinceHopper) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
FN_DEVICE void cluster_wait() {
  if constexpr (kSinceHopper) asm volatile("barrier.cluster.wait;" ::: "memory");
}

// threadIdx.x and blockIdx.x, read anew: what follows from them need not stay in registers meanwhile.
FN_DEVICE int thread_again() {
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}
FN_DEVICE int block_again() {
  int i;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
  return i;
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

extern __shared__ __align__(1024) char shared_memory[];

FN_DEVICE unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// What the blocks of a cluster send to this one, counted in bytes by a barrier of 8 bytes in its shared memory. A cluster
// barrier would do, but orders global memory too: it waits until every store so far has arrived there.
class MBarrier {
 public:
  static constexpr int kBytes = 8;

  FN_DEVICE explicit MBarrier(int offset) : address_(shared_address(shared_memory + offset)) {}

  // By one thread, before the cluster meets for the first time.
  FN_DEVICE void start() const {
    if constexpr (kSinceHopper) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
  }
  // By one thread, once for each round of sending.
  FN_DEVICE void expect(int bytes) const {
    if constexpr (kSinceHopper)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_), "r"(bytes) : "memory");
  }
  // Until all is here; `odd` in every other round.
  FN_DEVICE void wait(bool odd) const {
    if constexpr (kSinceHopper)
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "again:\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
          "@!done bra again;\n"
          "}" ::"r"(address_), "r"(int(odd)) : "memory");
  }
  FN_DEVICE unsigned address() const { return address_; }

 private:
  unsigned address_;
};

// Of kernels launched one after another: the next may start where this one leaves room, and waits until it has ended.
FN_DEVICE void trigger_dependents() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
FN_DEVICE void wait_for_dependency() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Copies of this thread begun since the last commit are a group; wait until all but the newest PENDING are there.
FN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Orders this thread's writes to shared memory, copies that it waited for included, before `wgmma` reads them, which is by
// the asynchronous proxy. A barrier must follow.
FN_DEVICE void fence_for_warpgroups() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// An array in the block's dynamic shared memory, `offset` bytes in.
template <class V>
class Shared {
 public:
  FN_DEVICE explicit Shared(int offset) : data_(reinterpret_cast<V*>(shared_memory + offset)) {}
  FN_DEVICE unsigned address(int i) const { return shared_address(data_ + i); }
  FN_DEVICE V get(int i) const { return data_[i]; }
  FN_DEVICE void set(int i, V value) const { data_[i] = value; }
  // To the shared memory of a block of the cluster, where `arrivals` counts it.
  FN_DEVICE void send(int rank, int i, V value, const MBarrier& arrivals) const {
    if constexpr (kSinceHopper) {
      unsigned slot, barrier;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(slot) : "r"(shared_address(data_ + i)), "r"(rank));
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(arrivals.address()), "r"(rank));
      if constexpr (sizeof(V) == 8)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(slot),
                     "l"(__double_as_longlong(value)), "r"(barrier)
                     : "memory");
      else
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(slot),
                     "r"(__float_as_uint(value)), "r"(barrier)
                     : "memory");
    }
  }
  // 16 bytes from global memory, not waited for; zeros where not `inside`.
  FN_DEVICE void copy(int i, const void* from, bool inside) const {
    static_assert(sizeof(V) == 16);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(data_ + i)),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
  }

 private:
  V* data_;
};

}  // namespace fusednorm_cuda

#else

#include <cmath>
#include <cstring>

#include "../../emulation/emulation.h"

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
constexpr bool kSinceHopper = true;
#if defined(FN_EMULATED_WARPGROUPS)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

inline void sync_threads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Machine::get().sync_threads({file, line});
}
inline void sync_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Machine::get().sync_cluster({file, line});
}
inline void cluster_arrive() {}
inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { sync_cluster(file, line); }
inline int thread_again() { return int(threadIdx.x); }
inline int block_again() { return int(blockIdx.x); }
inline int cluster_rank() { return int(Machine::get().cluster_rank()); }
inline int cluster_size() { return int(Machine::get().cluster_size()); }
inline void compiler_fence() {}
inline void trigger_dependents() {}
inline void wait_for_dependency() {}
inline void fence_for_warpgroups() {}
inline void commit_copies() { Machine::get().commit_copies(); }
template <int PENDING>
void wait_copies(int line = __builtin_LINE()) {
  Machine::get().wait_copies(PENDING, line);
}

template <class V>
V shuffle_xor(V value, int offset, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = Machine::get().shuffle_xor(kEveryLane, bits, offset, {file, line});
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

// Where the blocks of a cluster wait for what they send one another, all of them meet, and see that it was so much.
class MBarrier {
 public:
  static constexpr int kBytes = 8;
  explicit MBarrier(int offset) : offset_(offset) {}
  void start() const { Machine::get().mail(unsigned(cluster_rank()), offset_) = {true, 0, 0, 0}; }
  void expect(int bytes) const { Machine::get().expect_mail(offset_, bytes); }
  void wait(bool odd, const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    sync_cluster(file, line);
    Machine::get().check_mail(offset_, odd);
  }
  int offset() const { return offset_; }

 private:
  int offset_;
};

template <class V>
class Shared {
 public:
  explicit Shared(int offset) : offset_(size_t(offset)) {}
  V get(int i, int line = __builtin_LINE()) const {
    return Machine::get().shared_read<V>(unsigned(cluster_rank()), at(i), line);
  }
  void set(int i, V value, int line = __builtin_LINE()) const {
    Machine::get().shared_write(unsigned(cluster_rank()), at(i), value, line);
  }
  void send(int rank, int i, V value, const MBarrier& arrivals, int line = __builtin_LINE()) const {
    Machine::get().shared_write(unsigned(rank), at(i), value, line);
    Machine::get().mail(unsigned(rank), arrivals.offset()).received += int64_t(sizeof(V));
  }
  void copy(int i, const void* from, bool inside, int line = __builtin_LINE()) const {
    static_assert(sizeof(V) == 16);
    V value{};
    if (inside) value = *static_cast<const V*>(from);
    Machine::get().begin_copy(at(i), &value, line);
  }
  size_t at(int i) const { return offset_ + size_t(int64_t(i)) * sizeof(V); }

 private:
  size_t offset_;
};

}  // namespace fusednorm_cuda

#endif
