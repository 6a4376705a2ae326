// The launch that adds partial sums.
#pragma once

#include "args.h"

namespace fusednorm_cuda {

// `wide`: of doubles. `early`: its blocks may stand ready while what was launched before ends (from compute capability 9.0).
void sum_partials(const Finalize& a, int n_sums, bool wide, bool early, void* cuda_stream);

// The same where some of the sums are one vector for each sample. It chooses `lanes`.
void sum_sample_partials(SampleFinalize a, int n_sums, bool wide, bool early, void* cuda_stream);

}  // namespace fusednorm_cuda
