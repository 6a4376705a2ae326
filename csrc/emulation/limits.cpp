// The machine that is emulated, as tests set it: small blocks let small rows reach every form.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "../cuda/support/machine.h"
#include "emulation.h"

namespace fusednorm_cuda {

namespace {

Limits emulated;

void emulate(int64_t forward_threads, int64_t backward_threads, int64_t clusters, int64_t processors, int64_t seed) {
  emulated = {int(forward_threads), int(backward_threads), int(clusters), int(processors)};
  fusednorm_emulation::Machine::get().seed = uint64_t(seed);
}

// Every launch on `device` fails, and says `message`; none does if that is empty.
void fail(int64_t device, std::string message) {
  auto& faults = fusednorm_emulation::Machine::get().faults;
  if (message.empty())
    faults.erase(int(device));
  else
    faults[int(device)] = message;
}

}  // namespace

OnDevice::OnDevice(int device) : before_(fusednorm_emulation::Machine::get().device) {
  fusednorm_emulation::Machine::get().device = std::max(device, 0);  // a CPU has none
}

OnDevice::~OnDevice() { fusednorm_emulation::Machine::get().device = before_; }

Limits limits(int) { return emulated; }

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cuda, m) {
  m.def("emulate(int forward_threads, int backward_threads, int clusters, int processors, int seed) -> ()");
  m.def("fail(int device, str message) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, CompositeExplicitAutograd, m) {
  m.impl("emulate", TORCH_BOX(&emulate));
  m.impl("fail", TORCH_BOX(&fail));
}

}  // namespace fusednorm_cuda
