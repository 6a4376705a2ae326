// A CUDA driver that runs nothing, and notes every launch as the real one would read it.
//
// How many bytes a kernel's parameters have stands in its cubin. What the real driver refuses is refused: an image for
// another architecture, a function of another device, a grid or shared memory past the limits.
#include <cuda.h>
#include <elf.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <string>
#include <vector>

struct CUctx_st {
  int device;
};
struct CUfunc_st {
  std::string name;
  int device;
  unsigned dynamic_shared;
  std::map<unsigned, unsigned> sizes;  // of the parameters, in bytes
};
struct CUmod_st {
  std::map<std::string, CUfunc_st> functions;
};

namespace {

CUctx_st contexts[] = {{0}, {1}};
thread_local CUcontext current;
std::map<int, int> attributes[std::size(contexts)];
bool capturing;
std::string failing;
int calls_before;
std::vector<std::string> notes;

int current_device() { return current == nullptr ? 0 : current->device; }

bool fails(const char* function) {
  const bool found = failing == function && calls_before-- == 0;
  if (found) failing.clear();
  return found;
}

// From a section .nv.info.<kernel>: entries of a format, an attribute, and two bytes that may be the size of more.
std::map<unsigned, unsigned> parameter_sizes(const unsigned char* at, const unsigned char* end) {
  constexpr unsigned char kSized = 0x04, kParameter = 0x17;
  std::map<unsigned, unsigned> sizes;
  while (at < end) {
    std::uint16_t size, ordinal;
    std::memcpy(&size, at + 2, sizeof size);
    if (at[0] == kSized && at[1] == kParameter) {
      std::uint32_t packed;
      std::memcpy(&ordinal, at + 8, sizeof ordinal);
      std::memcpy(&packed, at + 12, sizeof packed);
      sizes[ordinal] = packed >> 18;
    }
    at += 4 + (at[0] == kSized ? size : 0);
  }
  return sizes;
}

}  // namespace

extern "C" {

// --- for the tests ---

void standin_set(int device, int attribute, int value) { attributes[device][attribute] = value; }
void standin_capture(int value) { capturing = value; }
int standin_device() { return current_device(); }
void standin_use(int device) { current = &contexts[device]; }
// The function fails, once, after so many calls.
void standin_fail(const char* function, int calls) { failing = function, calls_before = calls; }
int standin_noted() { return int(notes.size()); }
// kernel, device, stream, grid, block, cluster, shared memory, and each parameter's bytes
const char* standin_note(int index) { return notes[index].c_str(); }
void standin_forget() { notes.clear(); }

// --- devices and contexts ---

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = int(std::size(contexts)), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const auto found = attributes[device].find(attribute);
  if (found == attributes[device].end()) return CUDA_ERROR_INVALID_VALUE;
  return *value = found->second, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = &contexts[device], CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current_device(), CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t*, CUlimit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  return *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  return std::memcpy(value, &pointer, sizeof pointer), CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char** text) {
  static const std::map<CUresult, const char*> texts = {
      {CUDA_ERROR_INVALID_VALUE, "invalid argument"},
      {CUDA_ERROR_OUT_OF_MEMORY, "out of memory"},
      {CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"},
      {CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"},
      {CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"},
      {CUDA_ERROR_NOT_FOUND, "named symbol not found"},
      {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"},
      {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"},
  };
  const auto found = texts.find(code);
  return *text = found == texts.end() ? "unknown error" : found->second, CUDA_SUCCESS;
}

// --- modules; none is ever let go, so that none has another's address ---

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (fails(__func__)) return CUDA_ERROR_OUT_OF_MEMORY;
  if (capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (std::memcmp(image, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
  const auto bytes = static_cast<const unsigned char*>(image);
  const auto header = reinterpret_cast<const Elf64_Ehdr*>(bytes);
  auto& own = attributes[current_device()];
  const int architecture = 10 * own[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR] +
                           own[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR];
  const int shift = header->e_ident[EI_ABIVERSION] < 8 ? 0 : 8;
  if (int(header->e_flags >> shift & 0xff) != architecture) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const auto sections = reinterpret_cast<const Elf64_Shdr*>(bytes + header->e_shoff);
  const auto names = reinterpret_cast<const char*>(bytes + sections[header->e_shstrndx].sh_offset);
  *module = new CUmod_st;
  for (auto section = sections; section < sections + header->e_shnum; section++) {
    const std::string prefix = ".nv.info.", name = names + section->sh_name;
    if (name.rfind(prefix, 0) != 0) continue;
    const auto content = bytes + section->sh_offset;
    const std::string kernel = name.substr(prefix.size());
    (*module)->functions[kernel] = {
        kernel, current_device(), 48 << 10, parameter_sizes(content, content + section->sh_size)};
  }
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const auto found = module->functions.find(name);
  if (found == module->functions.end()) return CUDA_ERROR_NOT_FOUND;
  return *function = &found->second, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  const int most = attributes[function->device][CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN];
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > most) return CUDA_ERROR_INVALID_VALUE;
  return function->dynamic_shared = unsigned(value), CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

// --- launches ---

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (fails(__func__)) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  if (function->device != current_device()) return CUDA_ERROR_INVALID_HANDLE;
  const unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  const bool fits = x && x <= 0x7fffffff && y && y <= 65535 && z && z <= 65535 && threads && threads <= 1024;
  if (!fits || config->sharedMemBytes > function->dynamic_shared || extra != nullptr) return CUDA_ERROR_INVALID_VALUE;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = config->attrs[i].value.clusterDim.x;
  std::string note = function->name + " " + std::to_string(function->device) + " " +
                     std::to_string(reinterpret_cast<std::uintptr_t>(config->hStream));
  const unsigned numbers[] = {
      x, y, z, config->blockDimX, config->blockDimY, config->blockDimZ, cluster, config->sharedMemBytes};
  for (unsigned number : numbers) note += " " + std::to_string(number);
  for (const auto& [ordinal, size] : function->sizes) {
    note += ' ';
    for (unsigned byte = 0; byte < size; byte++) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char*>(parameters[ordinal])[byte]);
      note += digits;
    }
  }
  notes.push_back(note);
  return CUDA_SUCCESS;
}

}  // extern "C"
