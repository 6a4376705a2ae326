// Fibers of one operating-system thread, run in an order drawn from a seed: the threads of an emulated kernel.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusednorm_emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // red zones take room
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Bodies hold nothing that must be destroyed: where one fails, all are abandoned as they stand.
class Fibers {
 public:
  Fibers() = default;
  Fibers(const Fibers&) = delete;
  ~Fibers() {
    for (const Fiber& f : fibers_) munmap(f.stack, kStackBytes);
  }

  // Runs body(0) ... body(count - 1). Returns false where some wait and nothing is left to wake them.
  bool run(int count, uint64_t seed, void (*body)(int)) {
    body_ = body;
    random_ = seed * 2 + 1;
    failure_.clear();
    finished_ = 0;
    ready_.clear();
    while (int(fibers_.size()) < count) add_stack();
    for (int i = 0; i < count; ++i) {
      fibers_[i].started = false;
      fibers_[i].fake_stack = nullptr;
      ready_.push_back(i);
    }
    const int first = next();
    current_ = kScheduler;
    if (first != kScheduler) switch_to(first, false);
    if (!failure_.empty()) throw std::runtime_error(failure_);
    return finished_ == count;
  }

  int current() const { return current_; }

  // The current fiber stops until somebody wakes it.
  void wait() { switch_to(next(), false); }

  void wake(int fiber) { ready_.push_back(fiber); }

  [[noreturn]] void fail(const std::string& message) {
    failure_ = message;
    if (current_ == kScheduler) throw std::runtime_error(message);
    switch_to(kScheduler, true);
    __builtin_unreachable();
  }

 private:
  static constexpr int kScheduler = -1;

  struct Fiber {
    char* stack = nullptr;
    void* context[5];  // of __builtin_setjmp
    void* fake_stack = nullptr;
    bool started = false;
  };

  Fiber& fiber(int index) { return index == kScheduler ? scheduler_ : fibers_[index]; }

  void add_stack() {
    Fiber f;
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of an emulated thread");
    f.stack = static_cast<char*>(memory);
    fibers_.push_back(f);
  }

  int next() {
    if (ready_.empty()) return kScheduler;
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    std::swap(ready_[random_ % ready_.size()], ready_.back());
    const int chosen = ready_.back();
    ready_.pop_back();
    return chosen;
  }

  // ucontext makes a stack, jumps change between them: swapcontext would enter the operating system each time. GCC's own
  // jumps, because AddressSanitizer clears its marks of a whole stack at each longjmp.
  __attribute__((noinline, no_sanitize("address"))) void switch_to(int target, bool for_good) {
    const int previous = current_;
    if (target == previous) return;
    if (__builtin_setjmp(fiber(previous).context) == 0) leave_for(target, for_good);
    arrived(previous);
  }

  // Nothing on the stack here: what AddressSanitizer poisons around variables would stay, for it never returns.
  __attribute__((noinline, no_sanitize("address"))) void leave_for(int target, bool for_good) {
    leaving(fiber(current_), target, for_good);
    current_ = target;
    Fiber& to = fiber(target);
    if (target == kScheduler || to.started) __builtin_longjmp(to.context, 1);
    to.started = true;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(to.stack, kStackBytes);  // of a fiber abandoned there
#endif
    getcontext(&fresh_);
    fresh_.uc_stack.ss_sp = to.stack;
    fresh_.uc_stack.ss_size = kStackBytes;
    fresh_.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fresh_, reinterpret_cast<void (*)()>(entry), 2, unsigned(self), unsigned(uint64_t(self) >> 32));
    setcontext(&fresh_);
  }

  static void entry(unsigned low, unsigned high) {
    reinterpret_cast<Fibers*>(uintptr_t(low) | uintptr_t(uint64_t(high) << 32))->work();
  }

  void work() {
    arrived(current_);
    body_(current_);
    ++finished_;
    switch_to(next(), true);
  }

  // AddressSanitizer must know on which stack it is.
  void leaving([[maybe_unused]] Fiber& from, [[maybe_unused]] int target, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = target == kScheduler ? scheduler_bottom_ : fibers_[target].stack;
    const size_t size = target == kScheduler ? scheduler_size_ : kStackBytes;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, bottom, size);
    came_from_ = &from == &scheduler_;
#endif
  }

  void arrived([[maybe_unused]] int index) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    Fiber& f = fiber(index);
    __sanitizer_finish_switch_fiber(f.fake_stack, &bottom, &size);
    f.fake_stack = nullptr;
    if (came_from_) scheduler_bottom_ = bottom, scheduler_size_ = size;
#endif
  }

  std::vector<Fiber> fibers_;
  std::vector<int> ready_;
  Fiber scheduler_;
  ucontext_t fresh_;
  void (*body_)(int) = nullptr;
  int current_ = kScheduler, finished_ = 0;
  uint64_t random_ = 1;
  std::string failure_;
  [[maybe_unused]] const void* scheduler_bottom_ = nullptr;
  [[maybe_unused]] size_t scheduler_size_ = 0;
  [[maybe_unused]] bool came_from_ = false;
};

}  // namespace fusednorm_emulation
