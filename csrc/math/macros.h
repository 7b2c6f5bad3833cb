// Function qualifiers shared by every formula, so that one text compiles for the CPU and for CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FMK_HD __host__ __device__ __forceinline__
#else
// Forced inlining lets each target_clones variant of a caller vectorise the formula for its own instruction set.
#define FMK_HD inline __attribute__((always_inline))
#endif

namespace fmk {

template <class To, class From>
FMK_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The overloads for float: C's own functions would silently compute in double.
using std::cos;
using std::exp;
using std::expm1;
using std::fabs;
using std::log;
using std::log1p;
using std::pow;
using std::sin;
using std::sqrt;

constexpr double PI = 3.14159265358979323846;

template <class T>
FMK_HD T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

}  // namespace fmk
