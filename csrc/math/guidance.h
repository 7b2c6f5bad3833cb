// Classifier-free guidance (Ho and Salimans 2022) and the rescaling of what it gives (Lin et al. 2023, section 3.4).
// Mirrored by fmkernels/ops/guided_euler.py and fmkernels/triton_kernels/guided_euler.py.
#pragma once

#include "macros.h"

namespace fmk {

// v_u + w (v_c - v_u), taken from the nearer end: exactly v_u at w = 0 and v_c at w = 1.
template <class T>
FMK_HD bool nearer_unconditional(T w) {
  return w < T(0.5);
}
template <class T>
FMK_HD T guided_velocity(T w, T nearer, T c, T u) {
  return nearer + (nearer_unconditional(w) ? w : w - T(1)) * (c - u);
}

// Count, mean and sum of squared deviations of a set of numbers.
struct Moments {
  double count = 0, mean = 0, squares = 0;
};

// Those of two sets together (Chan, Golub and LeVeque 1979). Sets of one and the same number leave squares at 0.
FMK_HD Moments joined(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  const double count = a.count + b.count, difference = b.mean - a.mean;
  return {count, a.mean + difference * (b.count / count),
          a.squares + b.squares + difference * difference * (a.count * b.count / count)};
}

// φ std(v_c) / std(v) + 1 - φ, the same for either definition of std; 1 where v is constant.
FMK_HD double rescale_factor(double phi, const Moments& c, const Moments& v) {
  return v.squares == 0 ? 1.0 : phi * sqrt(c.squares / v.squares) + (1.0 - phi);
}

}  // namespace fmk
