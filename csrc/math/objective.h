// Objectives: the residual of a row is r = p·prediction + a·x1 + b·x0 + c·z, the loss w·ρ(r). Mirrored by
// fmkernels/objectives.py and fmkernels/triton_kernels/_math.py under the same names.
#pragma once

#include "schedule.h"

namespace fmk {

enum Prediction {
  PREDICT_VELOCITY = 0,
  PREDICT_NOISE = 1,
  PREDICT_DATA = 2,
  PREDICT_SCORE = 3,
  PREDICT_EDM = 4,
};
enum Compare { COMPARE_NATIVE = 0, COMPARE_VELOCITY = 1 };
enum Weight {
  WEIGHT_NONE = 0,
  WEIGHT_MIN_SNR = 1,     // parameter k
  WEIGHT_SIGMA_SQRT = 2,  // σ⁻²
  WEIGHT_COS_MAP = 3,     // 2 / (π (1 - 2σ + 2σ²))
  WEIGHT_LIKELIHOOD = 4,  // g²/σ² = 2W/(ασ), for residuals scaled by σ
};

constexpr double SIGMA_FLOOR = 1e-5;  // keeps σ⁻² finite at t = 1

// One row of the table that matching_loss reads; `time` is what the network is given as t, `scale` what x_t is
// multiplied with before it is given to the network (both differ from t and 1 for EDM alone).
template <class T>
struct Row {
  T p, a, b, c, w, time, scale;
};

template <class T>
FMK_HD T objective_weight(int weight, T k, int prediction, const Coefficients<T>& v) {
  const T sigma = v.sigma > T(SIGMA_FLOOR) ? v.sigma : T(SIGMA_FLOOR);
  const T w = v.d_alpha * v.sigma - v.alpha * v.d_sigma;
  const T snr = v.alpha * v.alpha / (sigma * sigma);
  const T divisor = v.alpha == T(0) ? T(1) : w;  // where α = 0, W may be 0 too, and the min-SNR weight is 0
  switch (weight) {
    case WEIGHT_MIN_SNR:
      if (prediction == PREDICT_DATA) return snr < k ? snr : k;
      if (prediction == PREDICT_NOISE) return snr < k ? T(1) : k / snr;
      return (snr < k ? snr : k) * v.sigma * v.sigma / (divisor * divisor);
    case WEIGHT_SIGMA_SQRT:
      return T(1) / (sigma * sigma);
    case WEIGHT_COS_MAP:
      return T(2) / (T(PI) * (T(1) - T(2) * v.sigma + T(2) * v.sigma * v.sigma));
    case WEIGHT_LIKELIHOOD:
      return T(2) * w / (v.alpha * sigma);
  }
  return T(1);
}

// o0: the floor ε of σ for data prediction under a velocity loss; σ_data for EDM.
template <class T>
FMK_HD Row<T> objective_row(int prediction, int compare, T o0, int weight, T k, T t, const Coefficients<T>& v) {
  const T w = v.d_alpha * v.sigma - v.alpha * v.d_sigma;
  Row<T> row{T(1), T(0), T(0), T(0), objective_weight(weight, k, prediction, v), t, T(1)};
  switch (prediction) {
    case PREDICT_VELOCITY:
      row.a = -v.d_alpha;
      row.b = -v.d_sigma;
      row.c = -v.d_gamma;
      break;
    case PREDICT_NOISE:
      row.p = compare == COMPARE_NATIVE ? T(1) : -w / v.alpha;
      row.b = -row.p;
      break;
    case PREDICT_DATA:
      row.p = compare == COMPARE_NATIVE ? T(1) : w / (v.sigma > o0 ? v.sigma : o0);
      row.a = -row.p;
      break;
    case PREDICT_SCORE:
      row.p = compare == COMPARE_NATIVE ? v.sigma : w * v.sigma / v.alpha;
      row.b = compare == COMPARE_NATIVE ? T(1) : w / v.alpha;
      break;
    case PREDICT_EDM: {
      const T tiny = T(1e-20);  // keeps the logarithm finite at both ends
      const T root = sqrt(v.sigma * v.sigma + v.alpha * v.alpha * o0 * o0);
      row.a = -v.sigma / (o0 * root);
      row.b = v.alpha * o0 / root;
      row.time = T(0.25) * log((v.sigma > tiny ? v.sigma : tiny) / (v.alpha > tiny ? v.alpha : tiny));
      row.scale = T(1) / root;
      break;
    }
  }
  return row;
}

}  // namespace fmk
