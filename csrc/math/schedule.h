// Schedules: x_t = α(t) x1 + σ(t) x0 + γ(t) z, t = 0 noise, t = 1 data. Mirrored by fmkernels/schedules.py and
// fmkernels/triton_kernels/_math.py under the same names.
#pragma once

#include "normal.h"

namespace fmk {

enum Schedule {
  SCHEDULE_COND_OT = 0,
  SCHEDULE_VP = 1,
  SCHEDULE_VE = 2,
  SCHEDULE_COSINE = 3,
  SCHEDULE_LINEAR_VP = 4,
  SCHEDULE_SUB_VP = 5,
  SCHEDULE_POLYNOMIAL = 6,
  SCHEDULE_CONSTANT_NOISE = 7,
  SCHEDULE_SCHRODINGER_BRIDGE = 8,
  SCHEDULE_CUSTOM = 9,  // the coefficients come as a per-row table
};

template <class T>
struct Coefficients {
  T alpha, sigma, gamma, d_alpha, d_sigma, d_gamma;
};

// s0, s1 by schedule: CondOT σmin; VP and SubVP βmin, βmax; VE σmin, σmax; Polynomial n; ConstantNoise and bridge s.
template <class T>
FMK_HD Coefficients<T> schedule_coefficients(int schedule, T s0, T s1, T t) {
  const T s = T(1) - t;
  const T half_pi = T(PI / 2);
  switch (schedule) {
    case SCHEDULE_COND_OT:
      return {t, T(1) - (T(1) - s0) * t, T(0), T(1), s0 - T(1), T(0)};
    case SCHEDULE_VP:
    case SCHEDULE_SUB_VP: {
      const T integral = s * s0 + T(0.5) * s * s * (s1 - s0);
      const T beta = s0 + s * (s1 - s0);
      const T alpha = exp(T(-0.5) * integral);
      const T variance = -expm1(-integral);  // 1 - exp(-T) would be 1 % wrong at s = 1e-5 in fp32
      const T d_alpha = T(0.5) * beta * alpha;
      if (schedule == SCHEDULE_SUB_VP) return {alpha, variance, T(0), d_alpha, -beta * alpha * alpha, T(0)};
      const T sigma = sqrt(variance);
      return {alpha, sigma, T(0), d_alpha, T(-0.5) * beta * alpha * alpha / sigma, T(0)};
    }
    case SCHEDULE_VE: {
      const T log_ratio = log(s1 / s0);
      const T sigma = s0 * exp(s * log_ratio);
      return {T(1), sigma, T(0), T(0), -log_ratio * sigma, T(0)};
    }
    case SCHEDULE_COSINE: {
      const T alpha = sin_pi(T(0.5) * t), sigma = sin_pi(T(0.5) * s);
      return {alpha, sigma, T(0), half_pi * sigma, -half_pi * alpha, T(0)};
    }
    case SCHEDULE_LINEAR_VP: {
      const T sigma = sqrt(s * (T(1) + t));
      return {t, sigma, T(0), T(1), -t / sigma, T(0)};
    }
    case SCHEDULE_POLYNOMIAL: {
      const T sigma = -expm1(s0 * log(t));  // 1 - tⁿ without its cancellation near t = 1
      const T d_alpha = s0 * pow(t, s0 - T(1));
      return {pow(t, s0), sigma, T(0), d_alpha, -d_alpha, T(0)};
    }
    case SCHEDULE_CONSTANT_NOISE:
      return {t, s, s0, T(1), T(-1), T(0)};
    case SCHEDULE_SCHRODINGER_BRIDGE: {
      const T root = sqrt(t * s);
      return {t, s, s0 * root, T(1), T(-1), root > T(0) ? s0 * (T(1) - T(2) * t) / (T(2) * root) : T(0)};
    }
  }
  return {T(0), T(0), T(0), T(0), T(0), T(0)};
}

}  // namespace fmk
