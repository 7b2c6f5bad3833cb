// What a thread does with its chunk of neighbouring columns: 16-byte loads and stores, and random numbers.
#pragma once

#include "launch.h"
#include "math/normal.h"
#include "math/philox.h"

namespace fmk::cuda {

// Columns of a chunk: 16 bytes of the narrowest type, and at least the four normals of one Philox call.
template <class... T>
constexpr int WIDTH = ((sizeof(T) == 2) || ...) ? 8 : 4;

// Blocks that a multiprocessor is to hold at once, for arithmetic in A on elements of types T: as many as the registers
// allow without spills.
template <class A, class... T>
constexpr int RESIDENT = sizeof(A) == 8              ? 2
                         : ((sizeof(T) == 4) && ...) ? 4
                         : ((sizeof(T) == 2) && ...) ? 3
                                                     : 2;

// Whether whole chunks may be loaded and stored 16 bytes at a time, if every row starts where one may.
template <class... T>
bool aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}
inline bool rows_aligned(const Grid& grid, int width) { return grid.rows == 1 || grid.columns % width == 0; }

template <class T>
struct Pack {
  static constexpr int size = 16 / sizeof(T);
  T element[size];
};

// The first `count` elements at p as C, the rest 0. `vector`: p is aligned to 16 bytes.
template <class T, class C, int V>
__device__ __forceinline__ void load(C (&out)[V], const T* p, int count, bool vector) {
  if (vector && count == V) {
#pragma unroll
    for (int i = 0; i < V / Pack<T>::size; ++i) {
      const auto pack = bit_cast<Pack<T>>(reinterpret_cast<const uint4*>(p)[i]);
#pragma unroll
      for (int j = 0; j < Pack<T>::size; ++j) out[i * Pack<T>::size + j] = C(to_float(pack.element[j]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = j < count ? C(to_float(p[j])) : C(0);
  }
}

template <class T, class C, int V>
__device__ __forceinline__ void store(T* p, const C (&in)[V], int count, bool vector) {
  if (vector && count == V) {
#pragma unroll
    for (int i = 0; i < V / Pack<T>::size; ++i) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < Pack<T>::size; ++j) pack.element[j] = from_float<T>(in[i * Pack<T>::size + j]);
      store16(reinterpret_cast<uint4*>(p) + i, bit_cast<uint4>(pack));
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j < count) p[j] = from_float<T>(in[j]);
    }
  }
}

// Standard normals of columns 4 · group … 4 · group + 3 of a global row, rounded to T.
template <class T, class C>
__device__ __forceinline__ void draw_four(C (&out)[4], uint64_t seed, int64_t row, int64_t group, uint32_t stream) {
  const Words w = philox_row(seed, row, group, stream);
  typename compute<T>::type n[4];
  normal_pair(w.w0, w.w1, n[0], n[1]);
  normal_pair(w.w2, w.w3, n[2], n[3]);
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = C(to_float(from_float<T>(n[j])));
}

// The same of a whole chunk.
template <class T, class C, int V>
__device__ __forceinline__ void draw(C (&out)[V], uint64_t seed, int64_t row, int64_t chunk, uint32_t stream) {
#pragma unroll
  for (int group = 0; group < V / 4; ++group) {
    C n[4];
    draw_four<T>(n, seed, row, chunk * (V / 4) + group, stream);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[4 * group + j] = n[j];
  }
}

// A float32 or float64 tensor read by its dtype at run time.
struct Floats {
  const void* p;
  bool wide;

  Floats() : p(nullptr), wide(false) {}
  explicit Floats(const Tensor& tensor) : wide(tensor.scalar_type() == ScalarType::Double) {
    p = wide ? static_cast<const void*>(data<const double>(tensor)) : data<const float>(tensor);
  }
  FMK_HD explicit operator bool() const { return p != nullptr; }
  __device__ double operator[](int64_t i) const {
    return wide ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
  }
};

}  // namespace fmk::cuda
