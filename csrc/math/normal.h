// Two standard normals from two random words: Box–Muller with the same cheap, accurate map on every device.
//
//   u = ((w0 >> 1) + 1/2) 2^-31      θ = π int32(w1) 2^-32      r = sqrt(-2 ln u)
//   n0 = ± r cos θ   (sign from the low bit of w0)              n1 = r sin θ
//
// θ spans a half turn and the sign supplies the other half, so no quadrant logic is needed. The tail ends at 6.6 σ.
#pragma once

#include "macros.h"

namespace fmk {

// ln of u = (m + 1/2) 2^-31 for a 31-bit m. Near 1, u loses the bits that its logarithm is made of: there the signed
// distance to 1 is formed from m itself. Polynomial ln(1 + f)/f on [√½ - 1, √2 - 1], relative error 3e-8.
FMK_HD float log_uniform(int32_t m, float) {
  const float u = (float(m) + 0.5f) * 0x1p-31f;
  const float distance = -(float(0x7fffffff - m) + 0.5f) * 0x1p-31f;
  const int32_t bits = bit_cast<int32_t>(u);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float mantissa = bit_cast<float>(bits - (exponent << 23));
  const float f = exponent == 0 ? distance : mantissa - 1.0f;
  float q = 8.722355020e-02f;
  q = q * f - 1.436684280e-01f;
  q = q * f + 1.495226676e-01f;
  q = q * f - 1.656239311e-01f;
  q = q * f + 1.995683355e-01f;
  q = q * f - 2.500207407e-01f;
  q = q * f + 3.333418563e-01f;
  q = q * f - 4.999998796e-01f;
  q = q * f + 9.999999742e-01f;
  return float(exponent) * 6.931471806e-01f + q * f;
}

FMK_HD double log_uniform(int32_t m, double) {
  return m < 0x40000000 ? log((double(m) + 0.5) * 0x1p-31) : log1p(-(double(0x7fffffff - m) + 0.5) * 0x1p-31);
}

// sin πx and cos πx for |x| ≤ 1/2, absolute error 2e-8 before rounding.
FMK_HD float sin_pi(float x) {
  const float s = x * x;
  float q = 7.765940831e-02f;
  q = q * s - 5.982921595e-01f;
  q = q * s + 2.550077660e+00f;
  q = q * s - 5.167710090e+00f;
  q = q * s + 3.141592640e+00f;
  return q * x;
}
FMK_HD float cos_pi(float x) {
  const float s = x * x;
  float q = -2.439671660e-02f;
  q = q * s + 2.349375589e-01f;
  q = q * s - 1.335212057e+00f;
  q = q * s + 4.058709164e+00f;
  q = q * s - 4.934802137e+00f;
  return q * s + 1.0f;
}
#if defined(__CUDA_ARCH__)  // where sin and cos would reserve a stack for the reduction of huge arguments
FMK_HD double sin_pi(double x) { return ::sinpi(x); }
FMK_HD double cos_pi(double x) { return ::cospi(x); }
#else
FMK_HD double sin_pi(double x) { return sin(PI * x); }
FMK_HD double cos_pi(double x) { return cos(PI * x); }
#endif

template <class T>
FMK_HD void normal_pair(uint32_t w0, uint32_t w1, T& n0, T& n1) {
  const T radius = sqrt(T(-2) * log_uniform(int32_t(w0 >> 1), T(0)));
  const T turn = T(int32_t(w1)) * T(0x1p-32);
  const T sign = T(1) - T(2) * T(int32_t(w0 & 1u));
  n0 = sign * radius * cos_pi(turn);
  n1 = radius * sin_pi(turn);
}

}  // namespace fmk
