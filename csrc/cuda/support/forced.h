// Forms that take the place of the table's: those that were measured to be faster on this machine (fusednorm_cuda::keep),
// and before them one that somebody wants to try (fusednorm_cuda::force).
#pragma once

#include <atomic>
#include <stdexcept>
#include <unordered_map>

#include "forms.h"

namespace fusednorm_cuda {

// Of the whole process; a form without threads leaves the choice to the table.
struct Forced {
  Form forward{}, backward{};
  int programs = 0;     // of the backward; 0 leaves it to the table
  bool overlap = true;  // the sum of the partials may stand ready while the backward ends
};

Forced& forced();

struct KeptForm {
  Form form{};
  int programs = 0;
};
using KeptForms = std::unordered_map<uint64_t, KeptForm>;

// Null where there are none. A map never changes once it is here.
std::atomic<const KeptForms*>& kept();

// A tensor of the emulation is on no GPU, which counts as the first.
inline uint64_t kept_key(int device, bool backward, int64_t n, int vector) {
  return uint64_t(n) << 16 | uint64_t(std::max(device, 0)) << 8 | uint64_t(vector) << 1 | uint64_t(backward);
}

// The form that is kept for aligned rows; null: the table's, or the forced one.
inline const KeptForm* kept_form(const Form& table, bool backward, int device, int64_t n, int vector) {
  const KeptForms* all = kept().load(std::memory_order_acquire);
  if (!all || !table.aligned || (backward ? forced().backward : forced().forward).threads) return nullptr;
  const auto found = all->find(kept_key(device, backward, n, vector));
  return found == all->end() ? nullptr : &found->second;
}

inline Form forced_form(const Form& wanted, const Form& table, int64_t n, int vector) {
  if (!wanted.threads || !table.aligned) return table;
  Form form = wanted;
  form.aligned = true, form.staged = table.staged;
  form.tiles = int(ceil_div(n, int64_t(form.ranks) * form.threads * form.chunks * vector));
  return form;
}
inline Form chosen_forward(const Form& table, int device, int64_t n, int vector) {
  const KeptForm* kept = kept_form(table, false, device, n, vector);
  return forced_form(kept ? kept->form : forced().forward, table, n, vector);
}
// A row is one tile, or slabs that are blocks of their own.
inline Form forced_backward(const Form& table, int64_t n, int vector) {
  const Form form = forced_form(forced().backward, table, n, vector);
  if (form.tiles > 1 && (form.ranks > 1 || form.rows > 1))
    throw std::runtime_error("the forced form does not hold a row, and slabs have neither clusters nor rows side by side");
  return form;
}

}  // namespace fusednorm_cuda
