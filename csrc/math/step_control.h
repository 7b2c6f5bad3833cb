// The decision that ends an adaptive Runge–Kutta step, for one row: accept or reject, the next step size, the status.
//
//   factor = safety r^(−β1) r₋₁^(−β2) r₋₂^(−β3)          r: error ratio; r₋₁, r₋₂: those of the last accepted steps
//
// Nothing here branches on the data, so a loop over rows vectorises. Mirrors step_reference in
// fmkernels/ops/runge_kutta_step.py.
#pragma once

#include "macros.h"

namespace fmk {

// Rows of `control` and of `counters`.
enum Control {
  CONTROL_T,
  CONTROL_T_NEXT,
  CONTROL_END,
  CONTROL_ERROR,
  CONTROL_OLDER_ERROR,
  CONTROL_T_PREVIOUS,
  CONTROL_RATIO,
  CONTROLS
};
enum Counter {
  COUNTER_STATUS,
  COUNTER_ACCEPTED,
  COUNTER_REJECTED,
  COUNTER_CURSOR,
  COUNTER_AFTER_REJECTION,
  COUNTER_RUNNING,
  COUNTERS
};
enum Status { STATUS_RUNNING = -1, STATUS_DONE, STATUS_MAX_STEPS, STATUS_UNDERFLOW, STATUS_NON_FINITE };

constexpr int SETTINGS = 14;

// Entries of `settings`, in their order.
struct StepSettings {
  double safety, min_factor, max_factor, beta1, beta2, beta3, accepted_floor, after_rejection_cap, min_step, max_step,
      clip, step_limit, accept_at_min_step, snap;
};
static_assert(sizeof(StepSettings) == SETTINGS * sizeof(double));

constexpr double SMALLEST_RATIO = 0x1p-33;  // an error of zero counts as this one in powers
constexpr double SNAP_ULPS = 16 * 0x1p-52;
constexpr double UNDERFLOW_SPAN = 0x1p-100;
constexpr double INFINITE = __builtin_huge_val();

// log₂ x of a positive normal number: exponent and 2/ln 2 · atanh((m − 1)/(m + 1)) with m in [√½, √2].
FMK_HD double log2_of(double x) {
  const int64_t bits = bit_cast<int64_t>(x), from_root = bits - 0x3fe6a09e667f3bcd;
  // An exponent as a double without a conversion, which few vector units have: the low bits of 2^52 + 2^51.
  const int64_t exponent = (from_root >> 52);
  const double wide = bit_cast<double>(0x4338000000000000 + exponent) - 0x1.8p52;
  const double m = bit_cast<double>(bits - int64_t(uint64_t(exponent) << 52));
  const double s = (m - 1) / (m + 1), z = s * s;
  // Two halves of the polynomial at once: a chain half as long to wait for. Relative error 2e-17.
  const double w = z * z;
  double even = 0.2209130842311768, odd = 0.2136589569431927;
  even = even * w + 0.32059853491395984, odd = odd * w + 0.262334352504183;
  even = even * w + 0.5770780163455203, odd = odd * w + 0.4121985858409005;
  even = even * w + 2.8853900817779268, odd = odd * w + 0.9617966939259898;
  return wide + (odd * z + even) * s;
}

// 2^x, of x clamped to ±1000.
FMK_HD double exp2_of(double x) {
  const double bounded = clamp(x, -1000.0, 1000.0), shifted = bounded + 0x1.8p52, f = bounded - (shifted - 0x1.8p52);
  const double w = f * f;  // relative error 2e-17
  double even = 7.074194297288521e-09, odd = 4.4558179083360645e-10;
  even = even * w + 1.3215432535912375e-06, odd = odd * w + 1.0178057087733941e-07;
  even = even * w + 0.00015403530463724353, odd = odd * w + 1.5252733841556773e-05;
  even = even * w + 0.009618129107587256, odd = odd * w + 0.001333355814640647;
  even = even * w + 0.24022650695910158, odd = odd * w + 0.055504108664821625;
  even = even * w + 1, odd = odd * w + 0.6931471805599453;
  const uint64_t exponent = bit_cast<uint64_t>(shifted) - 0x4338000000000000u;
  return (odd * f + even) * bit_cast<double>((exponent + 1023) << 52);
}

// A condition as a number of the width of what it chooses between, all bits set or none: chains of `?:` become branches
// that compilers do not turn back.
using Mask = int64_t;
FMK_HD Mask mask(bool condition) { return -Mask(condition); }
FMK_HD int64_t choose(Mask m, int64_t yes, int64_t no) { return (yes & m) | (no & ~m); }
FMK_HD double choose(Mask m, double yes, double no) {
  return bit_cast<double>(choose(m, bit_cast<int64_t>(yes), bit_cast<int64_t>(no)));
}
FMK_HD double smaller(double x, double bound) { return x > bound ? bound : x; }  // NaN stays
FMK_HD double larger(double x, double bound) { return x < bound ? bound : x; }

struct StepDecision {
  double t, t_next, error, older_error, t_previous, ratio;
  int64_t status;
  Mask running, accepted;
};

// POWERS: how many of the exponents are used, from β1 on. `solved`: whether the solution is finite.
template <int POWERS>
FMK_HD StepDecision decide(const StepSettings& s, double t, double t_next, double end, double error, double older_error,
                           double t_previous, double last_ratio, double ratio, int64_t solved, int64_t old_status,
                           int64_t steps, int64_t after_rejection) {
  const int64_t last_step = s.step_limit < 0x1p31 ? int64_t(ceil(s.step_limit)) : INT64_MAX;

  const Mask running = mask(old_status == STATUS_RUNNING);
  const double h = t_next - t, size_now = fabs(h);
  const double rounding = SNAP_ULPS * larger(fabs(t), fabs(t_next));  // of t_next
  const Mask at_min = mask(size_now - rounding <= s.min_step) & mask(s.min_step > 0);
  const double direction = choose(mask(end > t), 1.0, choose(mask(end < t), -1.0, 0.0));
  const Mask finite = mask(solved != 0) & mask(fabs(ratio) < INFINITE);
  const Mask good = finite & (mask(ratio <= 1) | (at_min & mask(s.accept_at_min_step > 0)));

  const double small = larger(ratio, SMALLEST_RATIO);
  double factor = s.safety;
  if constexpr (POWERS > 0) {
    double exponent = -s.beta1 * log2_of(small);
    if constexpr (POWERS > 1) exponent -= s.beta2 * log2_of(error) + s.beta3 * log2_of(older_error);
    factor *= exp2_of(exponent);
  }
  const double growth = choose(mask(after_rejection > 0), s.after_rejection_cap, s.max_factor);
  factor = choose(finite, factor, s.min_factor);
  factor = larger(factor, choose(good & mask(ratio < 1), s.accepted_floor, s.min_factor));
  factor = smaller(factor, choose(good, growth, larger(s.safety, s.min_factor)));
  const double size = smaller(larger(size_now * factor, s.min_step), s.max_step);

  const double now = choose(good, t_next, t);
  const Mask done = good & mask((end - now) * direction <= 0);
  double following = now + direction * size;
  const double left = (end - following) * direction;
  const double near = SNAP_ULPS * larger(fabs(now), fabs(end)) + s.snap * size;
  following = choose(mask(s.clip > 0) & mask(left <= near), end, following);
  const Mask repeated = ~good & (at_min | mask(following == t_next));  // the step that was rejected
  const Mask stuck = mask(following == now) | mask(size <= UNDERFLOW_SPAN * fabs(end - now)) | repeated;
  const Mask last = mask(steps + 1 >= last_step);
  int64_t status = choose(last, int64_t(STATUS_MAX_STEPS), int64_t(STATUS_RUNNING));
  status = choose(stuck, choose(finite, int64_t(STATUS_UNDERFLOW), int64_t(STATUS_NON_FINITE)), status);
  status = choose(done, int64_t(STATUS_DONE), status);

  const Mask accepted = running & good, forget = running & ~finite;
  return {
      choose(accepted, now, t),
      choose(running, choose(done | stuck | last, now, following), t_next),
      choose(accepted, small, choose(forget, 1.0, error)),
      choose(accepted, error, choose(forget, 1.0, older_error)),
      choose(accepted, t, t_previous),
      choose(running, choose(finite, ratio, INFINITE), last_ratio),
      choose(running, status, old_status),
      running,
      accepted,
  };
}

}  // namespace fmk
