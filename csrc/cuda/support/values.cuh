// Sixteen bytes of a row and more, as they lie in memory and as numbers.
#pragma once

#include "../../common/inline.h"
#include "args.h"
#include "device.cuh"

namespace fusednorm_cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

template <class To, class From>
FN_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

#if defined(__CUDACC__)
FN_DEVICE uint32_t pack(float a, float b, BFloat16) { return bit_cast<uint32_t>(__floats2bfloat162_rn(a, b)); }
FN_DEVICE uint32_t pack(float a, float b, Float16) { return bit_cast<uint32_t>(__floats2half2_rn(a, b)); }
FN_DEVICE float widened(uint16_t bits, Float16) { return __half2float(__ushort_as_half(bits)); }
#else
inline uint16_t narrowed(float value, BFloat16) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t narrowed(float value, Float16) { return bit_cast<uint16_t>(_Float16(value)); }
template <class T>
uint32_t pack(float a, float b, T t) {
  return uint32_t(narrowed(a, t)) | uint32_t(narrowed(b, t)) << 16;
}
inline float widened(uint16_t bits, Float16) { return float(bit_cast<_Float16>(bits)); }
#endif
FN_DEVICE float widened(uint16_t bits, BFloat16) { return bit_cast<float>(uint32_t(bits) << 16); }

// V neighbouring elements as numbers.
template <class C, int V>
struct Numbers {
  C v[V];

  Numbers() = default;
  FN_DEVICE explicit Numbers(C value) {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = value;
  }
  FN_DEVICE C& operator[](int i) { return v[i]; }
  FN_DEVICE const C& operator[](int i) const { return v[i]; }

  // Those whose bit is set, zero for the others.
  FN_DEVICE Numbers kept(uint32_t bits) const {
    Numbers r;
#pragma unroll
    for (int i = 0; i < V; ++i) r.v[i] = bits >> i & 1 ? v[i] : C(0);
    return r;
  }
};

#define FN_OPERATOR(op)                                                                         \
  template <class C, int V>                                                                     \
  FN_DEVICE Numbers<C, V> operator op(const Numbers<C, V>& a, const Numbers<C, V>& b) {         \
    Numbers<C, V> r;                                                                            \
    FN_UNROLL for (int i = 0; i < V; ++i) r.v[i] = a.v[i] op b.v[i];                            \
    return r;                                                                                   \
  }
FN_OPERATOR(+)
FN_OPERATOR(-)
FN_OPERATOR(*)
FN_OPERATOR(/)
#undef FN_OPERATOR

// V neighbouring elements as they are stored: a multiple of 16 bytes.
template <class E, int V>
struct Raw {
  static constexpr int kBytes = V * sizeof(E);
  static constexpr int kWords = kBytes / 4;
  uint32_t words[kWords];

  FN_DEVICE Compute<E> get(int i) const {
    if constexpr (sizeof(E) == 2)
      return widened(uint16_t(words[i / 2] >> (i % 2 * 16)), E{});
    else if constexpr (sizeof(E) == 4)
      return bit_cast<float>(words[i]);
    else
      return bit_cast<double>(uint64_t(words[2 * i]) | uint64_t(words[2 * i + 1]) << 32);
  }

  FN_DEVICE Numbers<Compute<E>, V> numbers() const {
    Numbers<Compute<E>, V> r;
#pragma unroll
    for (int i = 0; i < V; ++i) r[i] = get(i);
    return r;
  }

  FN_DEVICE static Raw of(const Numbers<Compute<E>, V>& values) {
    Raw raw;
    if constexpr (sizeof(E) == 2) {
#pragma unroll
      for (int i = 0; i < V; i += 2) raw.words[i / 2] = pack(values[i], values[i + 1], E{});
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) raw.put(i, values[i]);
    }
    return raw;
  }

  // Elements [column, column + V) of a row of n columns; zeros past its end. Aligned rows end with a whole vector.
  template <bool ALIGNED>
  FN_DEVICE static Raw load(const void* row, int column, int n) {
    Raw raw;
#pragma unroll
    for (int w = 0; w < kWords; ++w) raw.words[w] = 0;
    if constexpr (ALIGNED) {
      if (column < n && sizeof(E) == 8) {  // as two numbers: of four words nvcc makes two loads for sm_100
        const auto* p = reinterpret_cast<const ulonglong2*>(static_cast<const E*>(row) + column);
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i) {
          const ulonglong2 v = p[i];
          raw.words[4 * i] = uint32_t(v.x), raw.words[4 * i + 1] = uint32_t(v.x >> 32);
          raw.words[4 * i + 2] = uint32_t(v.y), raw.words[4 * i + 3] = uint32_t(v.y >> 32);
        }
      } else if (column < n) {
        const auto* p = reinterpret_cast<const uint4*>(static_cast<const E*>(row) + column);
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i) raw.set(i, p[i]);
      }
    } else if constexpr (sizeof(E) == 2) {
      const auto* p = static_cast<const uint16_t*>(row) + column;
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (column + i < n) raw.words[i / 2] |= uint32_t(p[i]) << (i % 2 * 16);
    } else {
      const auto* p = static_cast<const E*>(row) + column;
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (column + i < n) raw.put(i, p[i]);
    }
    return raw;
  }

  // Element i, of more than 16 bits.
  FN_DEVICE void put(int i, E value) {
    if constexpr (sizeof(E) == 4) {
      words[i] = bit_cast<uint32_t>(value);
    } else {
      const uint64_t bits = bit_cast<uint64_t>(value);
      words[2 * i] = uint32_t(bits), words[2 * i + 1] = uint32_t(bits >> 32);
    }
  }

  // The word i of 16 bytes.
  FN_DEVICE void set(int i, uint4 v) {
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }

  template <bool ALIGNED>
  FN_DEVICE void store(void* row, int column, int n) const {
    if constexpr (ALIGNED) {
      if (column < n) {
        auto* p = reinterpret_cast<uint4*>(static_cast<E*>(row) + column);
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i)
          p[i] = uint4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
      }
    } else {
      auto* p = static_cast<E*>(row) + column;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (column + i >= n) continue;
        if constexpr (sizeof(E) == 2)
          p[i] = E{uint16_t(words[i / 2] >> (i % 2 * 16))};
        else
          p[i] = get(i);
      }
    }
  }
};

// A parameter's columns, zero past the row's end; the parameter is there.
template <class T, int V, bool ALIGNED>
FN_DEVICE Numbers<Compute<T>, V> load_parameter(const Parameter& parameter, int column, int n, int64_t sample = 0) {
  using C = Compute<T>;
  const int64_t at = sample * parameter.stride;
  if (sizeof(T) == sizeof(C) || parameter.wide)
    return Raw<C, V>::template load<ALIGNED>(static_cast<const C*>(parameter.data) + at, column, n).numbers();
  return Raw<T, V>::template load<ALIGNED>(static_cast<const T*>(parameter.data) + at, column, n).numbers();
}

// A vector of S, or where `narrow` of T: of what may have the dtype of x beside a wider residual.
template <class T, class S, int V>
struct Either {
  Raw<S, V> raw;

  template <bool ALIGNED>
  FN_DEVICE void load(bool narrow, const char* row, int column, int width) {
    if constexpr (sizeof(T) != sizeof(S)) {
      if (narrow) {
        const auto few = Raw<T, V>::template load<ALIGNED>(row, column, width);
#pragma unroll
        for (int w = 0; w < Raw<T, V>::kWords; ++w) raw.words[w] = few.words[w];
        return;
      }
    }
    raw = Raw<S, V>::template load<ALIGNED>(row, column, width);
  }

  FN_DEVICE Numbers<Compute<T>, V> numbers(bool narrow) const {
    if constexpr (sizeof(T) != sizeof(S)) {
      Raw<T, V> few;
#pragma unroll
      for (int w = 0; w < Raw<T, V>::kWords; ++w) few.words[w] = raw.words[w];
      if (narrow) return few.numbers();
    }
    return raw.numbers();
  }

  template <bool ALIGNED>
  FN_DEVICE static void store(const Numbers<Compute<T>, V>& v, bool narrow, void* rows, int64_t offset, int column, int width) {
    if constexpr (sizeof(T) != sizeof(S)) {
      if (narrow) return Raw<T, V>::of(v).template store<ALIGNED>(static_cast<T*>(rows) + offset, column, width);
    }
    Raw<S, V>::of(v).template store<ALIGNED>(static_cast<S*>(rows) + offset, column, width);
  }
};

FN_DEVICE const char* row_at(const Rows& rows, int64_t row) {
  if (rows.inner == 0) return rows.data + row * rows.stride;
  const int64_t outer = row / rows.inner;
  return rows.data + outer * rows.outer + (row - outer * rows.inner) * rows.stride;
}

}  // namespace fusednorm_cuda
