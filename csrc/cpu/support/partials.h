// Partial sums of chunks of rows, added up.
#pragma once

#include "rows.h"

namespace fusednorm_cpu {
namespace FN_ISA {

constexpr int kChunkGroup = 16;

// In order by groups, over a range of columns, and stored in a parameter's dtype.
template <class C>
void reduce_columns(const Partials& p, Dtype dtype, void* out, int64_t begin, int64_t end) {
  const C* const sums = (const C*)p.sums;
  for (int64_t j = begin; j < end; j += kBlock) {
    const int64_t count = end - j < kBlock ? end - j : kBlock;
    C totals[kBlock] = {};
    for (int64_t first = 0; first < p.n_chunks; first += kChunkGroup) {
      C group[kBlock] = {};
      for (int64_t chunk = first; chunk < p.n_chunks && chunk < first + kChunkGroup; ++chunk)
        for (int i = 0; i < kBlock; ++i) group[i] += sums[chunk * p.step + j + i];
      for (int i = 0; i < kBlock; ++i) totals[i] += group[i];
    }
    stage_out(totals, count, dtype, out, j);
  }
}

inline void reduce(const Partials& p, Dtype dtype, void* out, int64_t begin, int64_t end) {
  if (p.wide)
    reduce_columns<double>(p, dtype, out, begin, end);
  else
    reduce_columns<float>(p, dtype, out, begin, end);
}

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
