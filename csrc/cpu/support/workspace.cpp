#include "workspace.h"

#include <vector>

namespace fusednorm_cpu {

#if defined(__x86_64__)
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

namespace {

const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> list = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::kernels);
      found.push_back(&avx512::kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      found.push_back(&avx2::kernels);
#endif
    found.push_back(&baseline::kernels);
    return found;
  }();
  return list;
}

std::atomic<const Kernels*> in_use{usable().front()};

}  // namespace

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

std::string instruction_sets() {
  std::string names = kernels().name;
  for (const Kernels* k : usable())
    if (k != &kernels()) names += std::string(" ") + k->name;
  return names;
}

std::string vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") ? "amd" : __builtin_cpu_is("intel") ? "intel" : "";
#else
  return "";
#endif
}

void use_instruction_set(std::string name) {
  for (const Kernels* k : usable())
    if (name.empty() || name == k->name) {
      in_use = k;
      return;
    }
  STD_TORCH_CHECK(false, "instruction set '", name, "' was not built or does not run here; usable are ",
                  instruction_sets());
}

namespace {

constexpr int64_t kAlignment = 64;

Buffer aligned(int64_t bytes) {
  return Buffer(std::aligned_alloc(kAlignment, plus(bytes, kAlignment - 1) / kAlignment * kAlignment));
}

// Memory that stays from one call to the next: mapping pages anew costs more than what is done in them. More than kMost
// bytes stay until the next call that needs no more than kMost.
template <int64_t kMost>
class Kept {
  Buffer buffer_;
  int64_t size_ = 0;

 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_ || (size_ > kMost && bytes <= kMost)) {
      buffer_.reset();
      buffer_ = aligned(bytes);
      size_ = buffer_ ? bytes : 0;
    }
    return buffer_.get();
  }
};

void* checked(void* memory, const char* what, int64_t bytes) {
  STD_TORCH_CHECK(memory, "out of memory: ", bytes, " bytes for ", what);
  return memory;
}

}  // namespace

Buffer allocate(const char* what, int64_t bytes) {
  Buffer buffer = aligned(bytes);
  checked(buffer.get(), what, bytes);
  return buffer;
}

void* workspace(int64_t bytes) {
  static thread_local Kept<4 << 20> kept;
  return kept.at_least(bytes);
}

PartialSums::PartialSums(int64_t bytes) {
  constexpr int64_t kMost = 8 << 20;
  static thread_local Kept<kMost> kept;
  if (bytes > kMost) own_ = allocate("partial sums", bytes);
  data_ = own_ ? own_.get() : bytes ? checked(kept.at_least(bytes), "partial sums", bytes) : nullptr;
}

}  // namespace fusednorm_cpu
