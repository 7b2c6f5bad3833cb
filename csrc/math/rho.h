// Penalties ρ(r) of the residual and their derivatives.
#pragma once

#include "macros.h"

namespace fmk {

enum Rho { RHO_SQUARE = 0, RHO_ABSOLUTE = 1, RHO_PSEUDO_HUBER = 2 };

// Pseudo-Huber √(r² + k²) - k, written so that small r do not cancel.
template <class T>
FMK_HD T rho(int kind, T k, T r) {
  if (kind == RHO_ABSOLUTE) return r < T(0) ? -r : r;
  if (kind == RHO_PSEUDO_HUBER) return r * r / (sqrt(r * r + k * k) + k);
  return r * r;
}

template <class T>
FMK_HD T d_rho(int kind, T k, T r) {
  if (kind == RHO_ABSOLUTE) return r > T(0) ? T(1) : (r < T(0) ? T(-1) : r);  // r: 0 at 0, NaN stays NaN
  if (kind == RHO_PSEUDO_HUBER) return r / sqrt(r * r + k * k);
  return T(2) * r;
}

}  // namespace fmk
