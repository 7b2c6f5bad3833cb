// Two-byte floating-point storage with branch-free conversions that compilers vectorise; CUDA has instructions for
// them.
#pragma once

#include "macros.h"

namespace fmk {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FMK_HD float to_float(float x) { return x; }
FMK_HD double to_float(double x) { return x; }
FMK_HD float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FMK_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Shift exponent and fraction into place, then multiply by 2^112: subnormals come out normalised.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(0x77800000));
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep a full exponent
  const uint32_t bits = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000) << 16));
#endif
}

template <class T>
FMK_HD T from_float(float x);
template <class T>
FMK_HD T from_float(double x);

template <>
FMK_HD float from_float<float>(float x) {
  return x;
}
template <>
FMK_HD float from_float<float>(double x) {
  return float(x);
}
template <>
FMK_HD double from_float<double>(float x) {
  return double(x);
}
template <>
FMK_HD double from_float<double>(double x) {
  return x;
}

template <>
FMK_HD bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;  // the conversion of a pair is the faster one
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(x));
  return bf16{uint16_t(pair)};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bf16{uint16_t(nan ? (bits >> 16) | 0x40u : rounded >> 16)};
#endif
}

template <>
FMK_HD f16 from_float<f16>(float x) {
#if defined(__CUDA_ARCH__)
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // Normal: rebias the exponent and round to nearest even in integer arithmetic; overflow carries into infinity.
  const uint32_t rebiased = magnitude - 0x38000000u;
  const uint32_t normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 aligns the fraction to the last place of the result and rounds it in hardware.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return f16{uint16_t(half | sign)};
#endif
}

template <>
FMK_HD bf16 from_float<bf16>(double x) {
  return from_float<bf16>(float(x));
}
template <>
FMK_HD f16 from_float<f16>(double x) {
  return from_float<f16>(float(x));
}

// Arithmetic type of a storage type: sums and coefficients are never in half precision.
template <class T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};

}  // namespace fmk
