// Launches as the CUDA library makes them, by a runtime that runs nothing. It prints each request for shared memory:
// the device and the bytes.
#include <cuda_runtime.h>

#include <cstdio>
#include <thread>

namespace {

int current = 0;
bool failing = true;

cudaError_t get_device(int* device) { return *device = current, cudaSuccess; }
template <class Kernel>
cudaError_t set_attribute(Kernel, cudaFuncAttribute, int bytes) {
  if (failing) return cudaErrorMemoryAllocation;
  return std::printf("%d %d\n", current, bytes), cudaSuccess;
}

}  // namespace

#define cudaGetDevice get_device
#define cudaFuncSetAttribute set_attribute
#define cudaLaunchKernelEx(...) cudaSuccess
#include "cuda/support/launch.cuh"

namespace {

struct Nothing {};

template <int WHICH>
void kernel(const Nothing) {}

void launch(void (*which)(const Nothing), int device, int bytes) {
  current = device;
  fusednorm_cuda::launch<const Nothing>(which, {}, {1, 1, 32, 1, 1, bytes}, nullptr);
}

}  // namespace

int main() {
  try {
    launch(kernel<0>, 0, 50000);
  } catch (const std::runtime_error& fault) {
    std::puts(fault.what());
  }
  failing = false;
  for (const int device : {0, 1})
    for (const int bytes : {49152, 60000, 60000, 100000, 60000}) launch(kernel<0>, device, bytes);
  std::thread([] { launch(kernel<0>, 1, 60000), launch(kernel<1>, 1, 60000); }).join();
}
