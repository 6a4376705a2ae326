// Parameters as the kernels read them, and the sums that are their gradients.
#pragma once

#include <algorithm>

#include "operands.h"
#include "workspace.h"

namespace fusednorm_cpu {

// Parameters of a call as arrays of the compute type: where they lie, or converted. Their shape is that of columns, the
// dimensions of `s` behind `lead`.
//
// Each thread converts them for itself. It was once the caller's work, and the other threads read the caller's cache: with
// 2 MB of parameters that took four times as long as all rows.
template <class Call>
class Parameters {
 public:
  Parameters(Call& a, const Sizes& s, int64_t lead) : a_(a), shape_(s.sizes + lead), ndim_(s.ndim - lead) {}

  // Sets a member of the call: to null where there is no tensor.
  void read(const char* name, const Handle& tensor, const void* Call::*member, double shift = 0.0) {
    a_.*member = nullptr;
    if (!tensor) return;
    Conversion& c = conversions_[n_];
    describe(name, tensor, shape_, ndim_, 0, c.from);
    if (!a_.n_rows || !a_.n_columns) return;  // of an expanded one a copy may be more than there is memory
    a_.*member = c.from.data, ++given_;
    if (c.from.unit && c.from.dtype == (a_.wide ? kFloat64 : kFloat32) && shift == 0.0) return;
    c.member = member, c.shift = shift, ++n_;
  }

  // Whether all are left as they lie, contiguous and of this dtype.
  bool left_as(Dtype dtype) {
    bool left = n_ > 0 && n_ == given_;
    for (int i = 0; i < n_; ++i) {
      const Conversion& c = conversions_[i];
      left &= c.from.unit && c.from.dtype == dtype && c.shift == 0.0;
    }
    if (left) n_ = 0;
    return left;
  }

  int64_t bytes() const { return times(n_, bytes_of_one()); }

  // work(call, workspace) with what had to be converted in the workspace's first bytes().
  template <class F>
  void converted(void* memory, const F& work) const {
    if (!n_) return work(a_, memory);
    Call own = a_;
    char* next = (char*)memory;
    for (int i = 0; i < n_; ++i, next += bytes_of_one()) {
      const Conversion& c = conversions_[i];
      kernels().parameter(c.from, own.n_columns, own.wide, c.shift, next);
      own.*c.member = next;
    }
    work(own, next);
  }

 private:
  struct Conversion {
    Operand from;
    const void* Call::*member;
    double shift;
  };

  int64_t bytes_of_one() const { return times(padded(a_.n_columns), a_.wide ? 8 : 4); }

  Call& a_;
  const int64_t* const shape_;
  const int64_t ndim_;
  Conversion conversions_[4];
  int given_ = 0, n_ = 0;
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
