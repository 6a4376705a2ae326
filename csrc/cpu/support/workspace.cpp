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

constexpr int64_t kAlignment = 64, kKept = 4 << 20;  // what a thread keeps between calls; mapping pages anew costs more

namespace {

Buffer aligned(int64_t bytes) {
  return Buffer(std::aligned_alloc(kAlignment, plus(bytes, kAlignment - 1) / kAlignment * kAlignment));
}

}  // namespace

Buffer allocate(const char* what, int64_t bytes) {
  Buffer buffer = aligned(bytes);
  STD_TORCH_CHECK(buffer, "out of memory: ", bytes, " bytes for ", what);
  return buffer;
}

void* workspace(int64_t bytes) {
  static thread_local Buffer buffer;
  static thread_local int64_t size = 0;
  if (bytes > size || (size > kKept && bytes <= kKept)) {
    buffer.reset();
    buffer = aligned(bytes);
    size = buffer ? bytes : 0;
  }
  return buffer.get();
}

}  // namespace fusednorm_cpu
