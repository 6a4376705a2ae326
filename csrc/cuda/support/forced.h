// Forms that take the place of the table's. `fusednorm_cuda::keep` gives those that were measured to be faster here.
// `fusednorm_cuda::force` gives one that somebody wants to try. It comes before those that are kept.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <unordered_map>

#include "forms.h"

namespace fusednorm_cuda {

// Of the whole process; a form without threads leaves the choice to what is kept, and to the table.
struct Forced {
  Form forward{}, backward{};
  int programs = 0;     // of the backward; 0 leaves it to the table
  bool overlap = true;  // the sum of the partials may stand ready while the backward ends
};

Forced& forced();

using KeptForms = std::unordered_map<uint64_t, Form>;

// Null where there are none. A map never changes once it is here.
std::atomic<const KeptForms*>& kept();

// A tensor of the emulation is on no GPU, which counts as the first.
inline uint64_t kept_key(int device, bool backward, int64_t n, int vector) {
  return uint64_t(n) << 16 | uint64_t(std::max(device, 0)) << 8 | uint64_t(vector) << 1 | uint64_t(backward);
}

// The forced form, or else the one that is kept for such rows; without threads where there is neither.
inline Form given_form(bool backward, int device, int64_t n, int vector) {
  const Form& tried = backward ? forced().backward : forced().forward;
  const KeptForms* all = kept().load(std::memory_order_acquire);
  if (tried.threads || !all) return tried;
  const auto found = all->find(kept_key(device, backward, n, vector));
  return found == all->end() ? Form{} : found->second;
}

// What takes the place of the table's form. Rows that are not aligned keep it.
inline Form chosen_form(const Form& table, bool backward, int device, int64_t n, int vector) {
  Form form = table.aligned ? given_form(backward, device, n, vector) : Form{};
  if (!form.threads) return table;
  form.aligned = true, form.staged = table.staged;
  form.tiles = int(ceil_div(n, int64_t(form.ranks) * form.threads * form.chunks * vector));
  if (backward && form.tiles > 1 && (form.ranks > 1 || form.rows > 1))
    throw std::runtime_error("the forced form does not hold a row, and slabs have neither clusters nor rows side by side");
  return form;
}

}  // namespace fusednorm_cuda
