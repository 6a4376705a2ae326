// The machine that is emulated, as tests set it: small blocks let small rows reach every form.
#include <torch/csrc/stable/library.h>

#include "../cuda/machine.h"
#include "emulation.h"

namespace fusednorm_cuda {

namespace {

Limits emulated;

void emulate(int64_t forward_threads, int64_t backward_threads, int64_t clusters, int64_t processors, int64_t seed) {
  emulated = {int(forward_threads), int(backward_threads), int(clusters), int(processors)};
  fusednorm_emulation::Machine::get().seed = uint64_t(seed);
}

}  // namespace

Limits limits(int) { return emulated; }

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cuda, m) {
  m.def("emulate(int forward_threads, int backward_threads, int clusters, int processors, int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, CompositeExplicitAutograd, m) { m.impl("emulate", TORCH_BOX(&emulate)); }

}  // namespace fusednorm_cuda
