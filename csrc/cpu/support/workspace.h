// The choice of instruction set, threads, and memory that outlives a call.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>

#include "../norm/norm_args.h"

namespace fusednorm_cpu {

const Kernels& kernels();                            // of the instruction set in use
std::string instruction_sets();                      // that were built and run here, best first; the one in use first
std::string vendor();                                // of the processor: "amd", "intel", or "" for others
void use_instruction_set(std::string name);          // "" for the best

// At least `bytes`, aligned, this thread's until the next call of workspace(); null where there is no memory.
void* workspace(int64_t bytes);

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;
Buffer allocate(const char* what, int64_t bytes);

// Memory for the partial sums of a call. Up to 8 MiB stay with the thread between calls; more is freed with this.
class PartialSums {
  Buffer own_;
  void* data_;

 public:
  explicit PartialSums(int64_t bytes);
  void* get() const { return data_; }
};

// work(workspace, begin, end) over [0, count) on torch's threads, at least `grain` to a thread. Results must not depend
// on how the range is cut.
template <class F>
void parallel(int64_t count, int64_t grain, int64_t workspace_bytes, const F& work) {
  struct Context {
    const F& work;
    int64_t bytes;
    std::atomic<bool> failed;
  } context{work, workspace_bytes, {false}};
  const auto run = [](int64_t begin, int64_t end, void* argument) {
    auto& c = *(Context*)argument;
    void* memory = c.bytes ? workspace(c.bytes) : nullptr;
    if (c.bytes && !memory)
      c.failed = true;
    else
      c.work(memory, begin, end);
  };
  if (count <= grain)
    run(0, count, &context);
  else
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, run, &context));
  STD_TORCH_CHECK(!context.failed, "out of memory: a workspace of ", workspace_bytes, " bytes a thread");
}

}  // namespace fusednorm_cpu
