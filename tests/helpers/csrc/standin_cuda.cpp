// A CUDA driver that runs nothing, and notes every launch as the real one would read it.
//
// How many bytes a kernel's parameters have stands in its cubin or PTX. What the real driver refuses is refused: an image
// for another architecture, a function of another device, a grid, a block or shared memory past the limits.
#include <cuda.h>
#include <elf.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct CUctx_st {
  int device;
};
struct CUfunc_st {
  std::string name;
  int device;
  std::map<unsigned, unsigned> sizes;  // of the parameters, in bytes
  int architecture;                    // that it was compiled for
  unsigned threads = 1024;             // of a block, at most
  unsigned dynamic_shared = 48 << 10;
};
struct CUmod_st {
  std::map<std::string, CUfunc_st> functions;
};

namespace {

CUctx_st contexts[] = {{0}, {1}};
thread_local CUcontext current;
std::map<int, int> attributes[std::size(contexts)];
int capturing;  // 1: the current stream; 2: one of another thread
thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
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

int architecture() {
  auto& own = attributes[current_device()];
  return 10 * own[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR] + own[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR];
}

CUresult load_ptx(const std::string& text, std::map<std::string, CUfunc_st>& functions) {
  const int target = std::atoi(text.c_str() + text.find(".target sm_") + 11);
  if (target > architecture()) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const std::string entry = ".entry ", bound = ".maxntid ", declared = ".param ";
  for (size_t at = text.find(entry); at != text.npos; at = text.find(entry, at)) {
    at += entry.size();
    const std::string name = text.substr(at, text.find('(', at) - at), head = text.substr(at, text.find("\n{", at) - at);
    CUfunc_st function{name, current_device(), {}, target};
    for (size_t found = head.find(declared); found != head.npos; found = head.find(declared, found + 1)) {
      unsigned bytes = 0, count = 0;  // of a struct; no kernel takes anything else
      std::sscanf(head.c_str() + found, ".param .align %*u .b%u %*[^[][%u", &bytes, &count);
      function.sizes.emplace(function.sizes.size(), bytes / 8 * count);
    }
    if (const size_t most = head.find(bound); most != head.npos)
      function.threads = std::atoi(head.c_str() + most + bound.size());
    functions[name] = function;
  }
  return CUDA_SUCCESS;
}

CUresult load_cubin(const unsigned char* bytes, std::map<std::string, CUfunc_st>& functions) {
  const auto header = reinterpret_cast<const Elf64_Ehdr*>(bytes);
  const int shift = header->e_ident[EI_ABIVERSION] < 8 ? 0 : 8;
  if (int(header->e_flags >> shift & 0xff) != architecture()) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const auto sections = reinterpret_cast<const Elf64_Shdr*>(bytes + header->e_shoff);
  const auto names = reinterpret_cast<const char*>(bytes + sections[header->e_shstrndx].sh_offset);
  for (auto section = sections; section < sections + header->e_shnum; section++) {
    const std::string prefix = ".nv.info.", name = names + section->sh_name;
    if (name.rfind(prefix, 0) != 0) continue;
    const auto content = bytes + section->sh_offset;
    const std::string kernel = name.substr(prefix.size());
    functions[kernel] = {
        kernel, current_device(), parameter_sizes(content, content + section->sh_size), architecture()};
  }
  return CUDA_SUCCESS;
}

// With its cluster's size.
CUresult refusal(const CUlaunchConfig* config, CUfunction function, unsigned& cluster) {
  if (function->device != current_device()) return CUDA_ERROR_INVALID_HANDLE;
  cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = config->attrs[i].value.clusterDim.x;
  const unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  const bool fits = x && x <= 0x7fffffff && y && y <= 65535 && z && z <= 65535 && threads && threads <= function->threads;
  if (cluster > 1 && attributes[function->device][CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH] == 0) return CUDA_ERROR_INVALID_VALUE;
  if (!fits || x % cluster || cluster > 8 || config->sharedMemBytes > function->dynamic_shared)
    return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
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
bool standin_fails(const char* function) { return fails(function); }
int standin_noted() { return int(notes.size()); }
// kernel, device, stream, grid, block, cluster, shared memory, whether it may begin early, and each parameter's bytes
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
  return *status = capturing == 1 ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* other) { return std::swap(*other, mode), CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream) {
  return capturing == 1 ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
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
  if (capturing && mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const auto text = static_cast<const char*>(image);
  const bool ptx = std::strstr(text, ".target sm_") != nullptr;
  if (!ptx && std::memcmp(image, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = new CUmod_st;
  return ptx ? load_ptx(text, (*module)->functions)
             : load_cubin(static_cast<const unsigned char*>(image), (*module)->functions);
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const auto found = module->functions.find(name);
  if (found == module->functions.end()) return CUDA_ERROR_NOT_FOUND;
  return *function = &found->second, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  const int known = attribute == CU_FUNC_ATTRIBUTE_PTX_VERSION ? function->architecture : 0;
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : known, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (fails(__func__)) return CUDA_ERROR_OUT_OF_MEMORY;
  const int most = attributes[function->device][CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN];
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > most) return CUDA_ERROR_INVALID_VALUE;
  return function->dynamic_shared = unsigned(value), CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

// --- launches ---

// Groups of multiprocessors leave a rest of four.
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  unsigned cluster;
  if (const CUresult refused = refusal(config, function, cluster)) return refused;
  const int processors = attributes[function->device][CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT];
  return *count = (processors - 4) / int(cluster), CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (fails(__func__)) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  unsigned cluster, early = 0;
  if (const CUresult refused = refusal(config, function, cluster)) return refused;
  if (extra != nullptr) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      early = unsigned(config->attrs[i].value.programmaticStreamSerializationAllowed);
  std::string note = function->name + " " + std::to_string(function->device) + " " +
                     std::to_string(reinterpret_cast<std::uintptr_t>(config->hStream));
  const unsigned numbers[] = {
      config->gridDimX,  config->gridDimY, config->gridDimZ,       config->blockDimX, config->blockDimY,
      config->blockDimZ, cluster,          config->sharedMemBytes, early};
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
