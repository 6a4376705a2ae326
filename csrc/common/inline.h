// How a function that both libraries compile is declared.
//
// Of internal linkage: the CPU kernels are compiled once for each instruction set, and the linker must not merge them.
#pragma once

#if defined(__CUDACC__)
#define FN_SHARED static __device__ __forceinline__
#define FN_UNROLL _Pragma("unroll")
#else
#define FN_SHARED static inline __attribute__((always_inline))
#define FN_UNROLL _Pragma("GCC unroll 16")
#endif
