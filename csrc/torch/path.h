// What the path op does with a row, shared by its CPU and CUDA kernels.
#pragma once

#include "math/objective.h"
#include "math/timestep.h"

namespace fmk {

constexpr int64_t STORE_X0 = 1, STORE_Z = 2;
constexpr int64_t TABLE_COLUMNS = 6;

// The scalars of the op's schema that describe schedule, sampler and objective.
struct PathDescription {
  int schedule;
  double s0, s1, t_low, t_high;
  int sampler;
  double q0, q1, shift;
  int prediction, compare;
  double o0;
  int weight;
  double weight_k;
};

template <class T>
struct PathRow {
  T t, alpha, sigma, gamma;  // the path's coefficients, scaled as the network wants its input
  Row<T> loss;
};

// The schedule at t clamped to its range, or row `row` of `coefficients` (six a row) where they are given.
template <class T>
FMK_HD Coefficients<T> path_coefficients(const PathDescription& d, int64_t row, T t, const T* coefficients) {
  if (coefficients) {
    const T* c = coefficients + 6 * row;
    return {c[0], c[1], c[2], c[3], c[4], c[5]};
  }
  return schedule_coefficients(d.schedule, T(d.s0), T(d.s1), clamp(t, T(d.t_low), T(d.t_high)));
}

template <class T>
FMK_HD Row<T> path_objective(const PathDescription& d, T t, const Coefficients<T>& v) {
  return objective_row(d.prediction, d.compare, T(d.o0), d.weight, T(d.weight_k), t, v);
}

// t drawn from the row's uniform word u.
template <class T>
FMK_HD T drawn_time(const PathDescription& d, uint64_t seed, int64_t global_row, int64_t strata, double u) {
  u = stratified(seed, global_row, strata, u);
  return clamp(T(timestep_inverse_cdf(d.sampler, d.q0, d.q1, d.shift, u)), T(d.t_low), T(d.t_high));
}

// All of a row; t is drawn where it is null.
template <class T>
FMK_HD PathRow<T> path_row(const PathDescription& d, uint64_t seed, int64_t row, int64_t first_row, int64_t strata,
                           const T* t, const T* coefficients) {
  const T time = t ? t[row] : drawn_time<T>(d, seed, first_row + row, strata, time_word(seed, first_row + row));
  const Coefficients<T> v = path_coefficients(d, row, time, coefficients);
  const Row<T> loss = path_objective(d, time, v);
  return {time, v.alpha * loss.scale, v.sigma * loss.scale, v.gamma * loss.scale, loss};
}

template <class T>
FMK_HD void write_table(T* table, int64_t row, const Row<T>& r) {
  T* out = table + TABLE_COLUMNS * row;
  out[0] = r.p, out[1] = r.a, out[2] = r.b, out[3] = r.c, out[4] = r.w, out[5] = r.time;
}

}  // namespace fmk
