// What the bindings hand to every kernel: plain data.
#pragma once

#include "../../common/data.h"

namespace fusednorm_cuda {

using namespace fusednorm;

// A tensor as rows of columns that lie one after another; strides in bytes. Absent when data is null.
struct Rows {
  const char* data;
  int64_t stride;
  int64_t outer, inner;  // a second stride, taken every `inner` rows; inner is 0 where there is none
};

// A parameter, of the row dtype T, or where `wide` of the compute type. Absent when data is null.
struct Parameter {
  const void* data;
  bool wide;
  int stride;  // in elements, from a sample's vector to the next one's; 0 where all samples share one
};

// How threads share a row. A tile is `ranks * threads * chunks` vectors, of 16 bytes of the row dtype.
struct Form {
  bool aligned;  // rows and parameters are read and written 16 bytes at a time
  int chunks;    // vectors a thread
  int threads;   // of one block for one row: a power of two up to a warp, then whole warps
  int rows;      // a block
  int ranks;     // blocks of a cluster for one row
  int tiles;     // in a row
  bool staged;   // the backward's rows come through shared memory
};

// Partial sums, (sums, programs, columns), and the gradients they add up to.
struct Finalize {
  const void* partials;
  int programs, n_columns;
  void* gradient[4];  // of each of the sums
  Dtype dtype[4];
};

// Sums of which some are one vector for each sample. Partial sums are (sums, samples, programs, columns), so `programs`
// are those of a sample.
struct SampleFinalize : Finalize {
  int samples;
  int each;  // a bit for each of the sums: whether it has a vector for each sample
  int lanes;  // threads that add a sample's partial sums together, a power of two
};

}  // namespace fusednorm_cuda
