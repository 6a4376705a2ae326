// Parameters as the kernels read them, and the sums that are their gradients.
#pragma once

#include <algorithm>

#include "operands.h"
#include "workspace.h"

namespace fusednorm_cpu {

// Parameters of a call as arrays of the compute type: where they lie, or converted. Their shape is that of columns, the
// dimensions of `s` behind `lead`; or, where that is allowed, one vector for each sample.
//
// Each thread converts them for itself. It was once the caller's work, and the other threads read the caller's cache: with
// 2 MB of parameters that took four times as long as all rows.
template <class Call>
class Parameters {
 public:
  Parameters(Call& a, const Sizes& s, int64_t lead) : a_(a), s_(s), lead_(lead) {}

  // Sets a member of the call: to null where there is no tensor.
  void read(const char* name, const Handle& tensor, const void* Call::*member, double shift = 0.0, bool samples = false) {
    a_.*member = nullptr;
    if (!tensor) return;
    Read& r = reads_[n_];
    const Sizes own = samples ? check_samples(name, tensor, s_, lead_) : check_shape(name, tensor, s_.sizes + lead_, columns());
    const int64_t ahead = own.ndim - columns();
    describe(name, tensor, own, ahead, r.from);
    if (!a_.n_rows || !a_.n_columns) return;  // of an expanded one a copy may be more than there is memory
    a_.*member = r.from.data;
    r.member = member, r.shift = shift;
    r.of_samples = ahead > 0;
    r.step = ahead ? times(own.strides[0], kItemSize[r.from.dtype]) : 0;
    r.converts = !(r.from.unit && r.from.dtype == (a_.wide ? kFloat64 : kFloat32) && shift == 0.0);
    of_samples_ |= r.of_samples;
    (ahead ? n_samples_ : n_shared_) += r.converts;
    ++n_;
  }

  // Whether a parameter is one vector for each sample.
  bool of_samples() const { return of_samples_; }

  // Whether all are left as they lie, contiguous and of this dtype.
  bool left_as(Dtype dtype) {
    bool left = n_shared_ + n_samples_ > 0;
    for (int i = 0; i < n_; ++i) left &= reads_[i].from.unit && reads_[i].from.dtype == dtype && reads_[i].shift == 0.0;
    if (!left) return false;
    for (int i = 0; i < n_; ++i) reads_[i].converts = false;
    n_shared_ = n_samples_ = 0;
    return true;
  }

  int64_t bytes() const { return times(n_shared_ + n_samples_, bytes_of_one()); }

  // work(call, workspace, begin, end) over a range of rows, or of groups of rows, of which a sample has `of_sample`. What
  // had to be converted is in the workspace's first bytes().
  template <class F>
  void over(void* memory, int64_t begin, int64_t end, int64_t of_sample, const F& work) const {
    if (!n_shared_ && !of_samples_) return work(a_, memory, begin, end);
    Call own = a_;
    char* const rest = set(own, (char*)memory, false, 0);
    if (!of_samples_) return work(own, rest, begin, end);
    for (int64_t stop; begin < end; begin = stop) {
      const int64_t sample = begin / of_sample;
      stop = std::min(end, (sample + 1) * of_sample);
      work(own, set(own, rest, true, sample), begin, stop);
    }
  }

 private:
  struct Read {
    const void* Call::*member;
    double shift;
    Operand from;
    int64_t step;  // bytes from one sample's vector to the next one's
    bool of_samples, converts;
  };

  // Sets those of samples, or the others, and converts what has to be: to `next` on. Returns what is behind.
  char* set(Call& own, char* next, bool of_samples, int64_t sample) const {
    for (int i = 0; i < n_; ++i) {
      const Read& r = reads_[i];
      if (r.of_samples != of_samples) continue;
      own.*r.member = r.from.data + sample * r.step;
      if (!r.converts) continue;
      kernels().parameter(r.from, sample, own.n_columns, own.wide, r.shift, next);
      own.*r.member = next;
      next += bytes_of_one();
    }
    return next;
  }

  int64_t columns() const { return s_.ndim - lead_; }
  int64_t bytes_of_one() const { return times(padded(a_.n_columns), a_.wide ? 8 : 4); }

  Call& a_;
  const Sizes s_;
  const int64_t lead_;
  Read reads_[4];
  int n_ = 0, n_shared_ = 0, n_samples_ = 0;  // the last two: that are converted
  bool of_samples_ = false;
};

// Partial sums of so many groups of rows, one group's behind another's, added up for each group: on as many threads as are
// worth it where `grain` elements are worth one. Results are written one behind another.
inline void add_partials(const Partials& p, int64_t groups, int64_t n_columns, int64_t grain, Dtype dtype, void* out) {
  constexpr int64_t kColumns = 64;  // of a block: no two threads share a cache line
  const int64_t blocks = pieces(n_columns, kColumns), group_bytes = times(p.n_chunks, p.step, p.wide ? 8 : 4);
  parallel(times(groups, blocks), std::max<int64_t>(grain / kColumns / p.n_chunks, 1), 0,
           [&](void*, int64_t begin, int64_t end) {
             for (int64_t stop; begin < end; begin = stop) {
               const int64_t group = begin / blocks, first = begin - group * blocks;
               stop = std::min(end, (group + 1) * blocks);
               Partials of_group = p;
               of_group.sums = (const char*)p.sums + group * group_bytes;
               kernels().reduce(of_group, dtype, (char*)out + group * n_columns * kItemSize[dtype], first * kColumns,
                                std::min((first + stop - begin) * kColumns, n_columns));
             }
           });
}

}  // namespace fusednorm_cpu
