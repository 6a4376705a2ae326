// Forms that somebody wants to try: fusednorm_cuda::force, for benchmarks and tests.
#pragma once

#include <stdexcept>

#include "forms.h"

namespace fusednorm_cuda {

// Of the whole process; a form without threads leaves the choice to the table.
struct Forced {
  Form forward{}, backward{};
  int programs = 0;     // of the backward; 0 leaves it to the table
  bool overlap = true;  // the sum of the partials may stand ready while the backward ends
};

Forced& forced();

inline Form forced_form(const Form& wanted, const Form& table, int64_t n, int vector) {
  if (!wanted.threads || !table.aligned) return table;
  Form form = wanted;
  form.aligned = true, form.staged = table.staged;
  form.tiles = int(ceil_div(n, int64_t(form.ranks) * form.threads * form.chunks * vector));
  return form;
}
inline Form forced_forward(const Form& table, int64_t n, int vector) {
  return forced_form(forced().forward, table, n, vector);
}
// A row is one tile, or slabs that are blocks of their own.
inline Form forced_backward(const Form& table, int64_t n, int vector) {
  const Form form = forced_form(forced().backward, table, n, vector);
  if (form.tiles > 1 && (form.ranks > 1 || form.rows > 1))
    throw std::runtime_error("the forced form does not hold a row, and slabs have neither clusters nor rows side by side");
  return form;
}

}  // namespace fusednorm_cuda
