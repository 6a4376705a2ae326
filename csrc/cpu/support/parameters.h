// Parameters as the kernels read them, and the sums that are their gradients.
#pragma once

#include <algorithm>

#include "operands.h"
#include "workspace.h"

namespace fusednorm_cpu {

// Up to `most` parameters as arrays of the compute type: where they lie, or converted into one buffer. Their shape is
// that of columns, the dimensions of `s` behind `lead`.
class Parameters {
 public:
  template <class Call>
  Parameters(const Call& a, const Sizes& s, int64_t lead, int most)
      : n_rows_(a.n_rows),
        n_columns_(a.n_columns),
        wide_(a.wide),
        shape_(s.sizes + lead),
        ndim_(s.ndim - lead),
        most_(most) {}

  const void* get(const char* name, const Handle& tensor, double shift = 0.0) {
    if (!tensor) return nullptr;
    Operand operand;
    describe(name, tensor, shape_, ndim_, 0, operand);
    if (!n_rows_ || !n_columns_) return nullptr;  // of an expanded one a copy may be more than there is memory
    if (operand.unit && operand.dtype == (wide_ ? kFloat64 : kFloat32) && shift == 0.0) return operand.data;
    const int64_t bytes = times(padded(n_columns_), wide_ ? 8 : 4), all = times(most_, bytes);
    if (!used_ && all > int64_t(sizeof few_)) many_ = allocate("the parameters", all);
    char* const out = (many_ ? (char*)many_.get() : (char*)few_) + used_++ * bytes;
    kernels().parameter(operand, n_columns_, wide_, shift, out);
    return out;
  }

 private:
  const int64_t n_rows_, n_columns_;
  const bool wide_;
  const int64_t* const shape_;
  const int64_t ndim_, most_;
  double few_[256];  // an aligned allocation costs as much as a row of 64
  Buffer many_;
  int used_ = 0;
};

// Partial sums added up, on as many threads as are worth it where `grain` elements are worth one.
inline void add_partials(const Partials& p, int64_t n_columns, int64_t grain, Dtype dtype, void* out) {
  constexpr int64_t kColumns = 64;  // of a block: no two threads share a cache line
  parallel(pieces(n_columns, kColumns), std::max<int64_t>(grain / kColumns / p.n_chunks, 1), 0,
           [&](void*, int64_t begin, int64_t end) {
             kernels().reduce(p, dtype, out, begin * kColumns, std::min(end * kColumns, n_columns));
           });
}

}  // namespace fusednorm_cpu
