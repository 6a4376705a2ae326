// A CUDA runtime over the stand-in for the driver: what the CUDA library and nvcc's code in it ask of libcudart, and the
// current stream, which it asks of libtorch_cuda.
//
// Kernels are known by the addresses of their host stubs. Their PTX, uncompressed, is loaded on a device at the first use
// of one there.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>

namespace {

struct Kernel {
  const std::string* image;
  const char* name;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

thread_local cudaError_t last = cudaSuccess;

cudaError_t said(CUresult result) {  // both number errors alike
  const auto error = static_cast<cudaError_t>(result);
  return error == cudaSuccess ? error : last = error;
}

CUresult loaded(const void* stub, CUfunction* function) {
  static std::map<std::pair<const std::string*, CUdevice>, CUmodule> modules;
  const auto kernel = kernels().find(stub);
  if (kernel == kernels().end()) return CUDA_ERROR_INVALID_HANDLE;
  CUdevice device;
  cuCtxGetDevice(&device);
  const auto [image, name] = kernel->second;
  CUmodule& module = modules[{image, device}];
  if (module == nullptr) {
    CUmodule made;
    if (const CUresult fault = cuModuleLoadData(&made, image->c_str())) return fault;
    module = made;
  }
  return cuModuleGetFunction(function, module, name);
}

template <class F>
cudaError_t with(const void* stub, const F& f) {
  CUfunction function;
  const CUresult fault = loaded(stub, &function);
  return said(fault ? fault : f(function));
}

CUlaunchConfig of_driver(const cudaLaunchConfig_t* c) {
  const auto attributes = reinterpret_cast<CUlaunchAttribute*>(c->attrs);
  return {c->gridDim.x,  c->gridDim.y,  c->gridDim.z, c->blockDim.x, c->blockDim.y, c->blockDim.z, unsigned(c->dynamicSmemBytes),
          c->stream, attributes, c->numAttrs};
}

void* streams[2];

}  // namespace

extern "C" {

void standin_stream(int device, void* stream) { streams[device] = stream; }

int aoti_torch_get_current_cuda_stream(int device, void** stream) { return *stream = streams[device], 0; }

// --- what nvcc's code calls while the library is loaded ---

// A fat binary has a header of 16 bytes, then parts: kind, size of the part's header (at 4), bytes that follow it (at 8).
void** __cudaRegisterFatBinary(void* wrapper) {
  constexpr std::uint16_t kPtx = 1;
  const char* at;
  std::memcpy(&at, static_cast<char*>(wrapper) + 8, sizeof at);
  std::uint64_t size;
  std::memcpy(&size, at + 8, sizeof size);
  const char* const end = (at += 16) + size;
  auto* image = new std::string;  // never let go
  while (at < end) {
    std::uint16_t kind;
    std::uint32_t header;
    std::memcpy(&kind, at, sizeof kind), std::memcpy(&header, at + 4, sizeof header), std::memcpy(&size, at + 8, sizeof size);
    if (kind == kPtx) image->assign(at + header, size);
    at += header + size;
  }
  return reinterpret_cast<void**>(image);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** image, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[stub] = {reinterpret_cast<const std::string*>(image), name};
}
// Of launches by <<<>>>, which the library has not.
int __cudaGetKernel(void*, const void*) { std::abort(); }
int __cudaLaunchKernel() { std::abort(); }
int __cudaPopCallConfiguration() { std::abort(); }

// --- the runtime ---

cudaError_t cudaGetDevice(int* device) { return said(cuCtxGetDevice(device)); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return said(cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(attribute), device));
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* all, const void* stub) {
  return with(stub, [=](auto kernel) { return cuFuncGetAttribute(&all->ptxVersion, CU_FUNC_ATTRIBUTE_PTX_VERSION, kernel); });
}
cudaError_t cudaFuncGetName(const char** name, const void* stub) {
  return with(stub, [=](CUfunction) { return *name = kernels().at(stub).name, CUDA_SUCCESS; });
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  return with(stub, [=](auto f) { return cuFuncSetAttribute(f, static_cast<CUfunction_attribute>(attribute), value); });
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* stub, const cudaLaunchConfig_t* given) {
  const CUlaunchConfig config = of_driver(given);
  return with(stub, [&](CUfunction kernel) { return cuOccupancyMaxActiveClusters(count, kernel, &config); });
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* given, const void* stub, void** parameters) {
  const CUlaunchConfig config = of_driver(given);
  return with(stub, [&](CUfunction kernel) { return cuLaunchKernelEx(&config, kernel, parameters, nullptr); });
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return said(cuStreamSynchronize(stream)); }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return said(cuThreadExchangeStreamCaptureMode(reinterpret_cast<CUstreamCaptureMode*>(mode)));
}
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  const char* text;
  return cuGetErrorString(static_cast<CUresult>(error), &text), text;
}

}  // extern "C"
