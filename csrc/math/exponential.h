// The exponential function in a form that compilers vectorise, to two units in the last place.
#pragma once

#include "macros.h"

namespace fmk {

template <class T>
struct ExponentialTraits;
template <>
struct ExponentialTraits<float> {
  using Bits = int32_t;
  static constexpr int MANTISSA = 23, BIAS = 127, TERMS = 8;
  static constexpr float LEAST = -87, ROUND = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
};
template <>
struct ExponentialTraits<double> {
  using Bits = int64_t;
  static constexpr int MANTISSA = 52, BIAS = 1023, TERMS = 14;
  static constexpr double LEAST = -708, ROUND = 6755399441055744.0;
  static constexpr double LN2_HIGH = 6.93145751953125e-1, LN2_LOW = 1.42860682030941723212e-6;
};

// e^x for x up to 80; exactly 0 below -87 (double: -708).
template <class T>
FMK_HD T exponential(T x) {
  using Traits = ExponentialTraits<T>;
  using Bits = typename Traits::Bits;
  const bool vanishes = x < Traits::LEAST;
  const T clamped = vanishes ? T(0) : x;
  const T rounded = clamped * T(1.44269504088896340736) + Traits::ROUND;
  const T n = rounded - Traits::ROUND;
  const T r = (clamped - n * Traits::LN2_HIGH) - n * Traits::LN2_LOW;
  T sum = 1;
  for (int k = Traits::TERMS - 1; k > 0; --k) sum = 1 + sum * r * T(1.0 / k);
  const Bits exponent = bit_cast<Bits>(rounded) - bit_cast<Bits>(Traits::ROUND) + Bits(Traits::BIAS);
  return vanishes ? T(0) : sum * bit_cast<T>(Bits(exponent << Traits::MANTISSA));
}

}  // namespace fmk
