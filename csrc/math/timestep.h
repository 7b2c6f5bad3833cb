// Timestep samplers: t = F⁻¹(u) of one uniform u per row, formed in double precision. Direction: t = 1 is data.
#pragma once

#include "normal.h"
#include "permutation.h"
#include "philox.h"

namespace fmk {

enum TimestepSampler {
  TIMESTEP_UNIFORM = 0,       // q0 + (q1 - q0) u
  TIMESTEP_LOGIT_NORMAL = 1,  // sigmoid(q0 + q1 Φ⁻¹(u))
  TIMESTEP_MODE = 2,          // u - q0 (sin²(πu/2) - u)
  TIMESTEP_COS_MAP = 3,       // sin(πu/2) / (sin(πu/2) + cos(πu/2))
  TIMESTEP_BETA = 4,          // q0 (1 - u^(1/q1)), the inverse of Beta(1, q1) times q0
};

// clang-format off: one line a stretch of a Horner chain

// Φ⁻¹ by Wichura's rational approximations (Algorithm AS 241, PPND16), relative accuracy about 1e-16.
FMK_HD double inverse_normal_cdf(double u) {
  const double q = u - 0.5;
  if (fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    const double a = (((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r +
                          4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r +
                       1.3314166789178437745e2) * r + 3.3871328727963666080e0);
    const double b = (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r +
                          2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r +
                       4.2313330701600911252e1) * r + 1.0);
    return q * a / b;
  }
  double r = sqrt(-log(q < 0.0 ? u : 1.0 - u));
  double a, b;
  if (r <= 5.0) {
    r -= 1.6;
    a = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r +
             1.27045825245236838258e0) * r + 3.64784832476320460504e0) * r + 5.76949722146069140550e0) * r +
          4.63033784615654529590e0) * r + 1.42343711074968357734e0);
    b = (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r +
             1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e0) * r +
          2.05319162663775882187e0) * r + 1.0);
  } else {
    r -= 5.0;
    a = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r +
             2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580e0) * r +
          5.46378491116411436990e0) * r + 6.65790464350110377720e0);
    b = (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r +
             7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r +
          5.99832206555887937690e-1) * r + 1.0);
  }
  return q < 0.0 ? -a / b : a / b;
}

// clang-format on

// shift s moves towards noise for s > 1: t / (s - (s - 1) t).
FMK_HD double timestep_inverse_cdf(int sampler, double q0, double q1, double shift, double u) {
  double t = u;
  switch (sampler) {
    case TIMESTEP_UNIFORM:
      t = q0 + (q1 - q0) * u;
      break;
    case TIMESTEP_LOGIT_NORMAL:
      t = 1.0 / (1.0 + exp(-(q0 + q1 * inverse_normal_cdf(u))));
      break;
    case TIMESTEP_MODE: {
      const double sine = sin_pi(0.5 * u);
      t = u - q0 * (sine * sine - u);
      break;
    }
    case TIMESTEP_COS_MAP: {
      const double sine = sin_pi(0.5 * u);
      t = sine / (sine + cos_pi(0.5 * u));
      break;
    }
    case TIMESTEP_BETA:
      t = -q0 * expm1(log(u) / q1);
      break;
  }
  return shift == 1.0 ? t : t / (shift - (shift - 1.0) * t);
}

// The uniform word of a row.
FMK_HD double time_word(uint64_t seed, int64_t row) {
  return uniform(philox_row(seed, row, 0, stream_word(STREAM_TIME, 0)).w0);
}

// With `strata` = N > 0 the word's place inside stratum π(row) of N.
FMK_HD double stratified(uint64_t seed, int64_t row, int64_t strata, double u) {
  return strata > 0 ? (double(permute(seed, uint32_t(strata), uint32_t(row))) + u) / double(strata) : u;
}

}  // namespace fmk
