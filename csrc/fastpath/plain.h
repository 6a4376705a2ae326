// Whether nothing but a device's kernel and autograd would see an operator on these tensors: no subclass of Tensor, no
// transform, mode, autocast or tracing, in the tensors or in the thread.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/handles.h"

namespace fusednorm_fastpath {

bool plain(const at::Tensor& tensor, c10::DispatchKey device = c10::DispatchKey::CPU);  // an undefined one is
bool plain_thread();

// For the libraries, which know tensors by the stable ABI.
fusednorm::Handle handle(const at::Tensor& tensor);
at::Tensor take(fusednorm::Handle& handle);

}  // namespace fusednorm_fastpath
