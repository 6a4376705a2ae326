#include "plain.h"

#include <ATen/core/grad_mode.h>

#include <memory>
#include <type_traits>

namespace fusednorm_fastpath {

bool plain(const at::Tensor& tensor, c10::DispatchKey device) {
  if (!tensor.defined()) return true;
  const c10::DispatchKeySet usual = c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
                                    c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
  return tensor.key_set() - usual == c10::DispatchKeySet(device) && !tensor._fw_grad(0).defined();
}

namespace {

// What torch 2.11 leaves out during a backward, and later ones do not know; a tensor whose dimensions have names is not plain.
template <class Key, class = void>
struct Names {
  static c10::DispatchKeySet keys() { return {}; }
};
template <class Key>
struct Names<Key, std::void_t<decltype(Key::Named)>> {
  static c10::DispatchKeySet keys() { return c10::DispatchKeySet(Key::Named); }
};

}  // namespace

bool plain_thread() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  // inference mode takes away the one and leaves out the others; it has no gradients
  const c10::DispatchKeySet views(c10::DispatchKey::ADInplaceOrView);
  c10::DispatchKeySet excluded = keys.excluded_ - Names<c10::DispatchKey>::keys();
  if (!at::GradMode::is_enabled()) excluded = excluded - c10::autograd_dispatch_keyset - views;
  return (keys.included_ | views) == c10::default_included_set && excluded == c10::default_excluded_set;
}

fusednorm::Handle handle(const at::Tensor& tensor) {
  if (!tensor.defined()) return fusednorm::Handle();
  return fusednorm::Handle(reinterpret_cast<AtenTensorHandle>(new at::Tensor(tensor)));
}

at::Tensor take(fusednorm::Handle& handle) {
  std::unique_ptr<at::Tensor> tensor(reinterpret_cast<at::Tensor*>(handle.release()));
  return tensor ? std::move(*tensor) : at::Tensor();
}

}  // namespace fusednorm_fastpath
