// Why no kernel runs on a device, or nothing: a plain function, which no mode or transform of the dispatcher sees.
#include <algorithm>
#include <cstring>
#include <exception>

#include "../../common/export.h"
#include "first_launch.h"
#include "machine.h"

extern "C" FUSEDNORM_EXPORT void fusednorm_cuda_first_launch(int device, char* said, size_t room) {
  using namespace fusednorm_cuda;
  said[0] = 0;
  try {
    const OnDevice guard(device);
    first_launch(current_cuda_stream(device));
  } catch (const std::exception& fault) {
    const size_t length = std::min(std::strlen(fault.what()), room - 1);
    std::memcpy(said, fault.what(), length);
    said[length] = 0;
  }
}
