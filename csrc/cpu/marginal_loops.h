// The loops of marginal_field over the points of a tile or the columns of a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "math/exponential.h"
#include "tile.h"

namespace fmk {
namespace {

constexpr int64_t RUN = 128;  // numbers added up before their sum goes into one of doubles

// Products become logits, s = scale s + square ½‖x_j - c‖² + ln q_j; returns the largest. NaN is left out of it.
template <class T>
FMK_INLINE T to_logits_of(T* __restrict s, const T* __restrict halves, const T* __restrict weights, T scale, T square,
                          int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) {
    s[j] = scale * s[j] + (square * halves[j] + weights[j]);
    most = s[j] > most ? s[j] : most;
  }
  return most;
}

// s = scale (x_j - b)·(r - half (x_j - b)) + ln q_j of points that stand in columns; returns the largest.
template <class T>
FMK_INLINE T from_differences_of(T* __restrict s, const T* __restrict columns, const T* __restrict weights, const T* r,
                                 const T* base, T half, T scale, int64_t n, int64_t dims) {
  std::fill(s, s + n, T(0));
  for (int64_t d = 0; d < dims; ++d) {
    const T at = r[d], b = base[d];
    const T* __restrict column = columns + d * n;
    for (int64_t j = 0; j < n; ++j) {
      const T difference = column[j] - b;
      s[j] += difference * (at - half * difference);
    }
  }
  T most = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) {
    s[j] = scale * s[j] + weights[j];
    most = s[j] > most ? s[j] : most;
  }
  return most;
}

// sum += Σ p (x_j - b) of points that stand in columns; returns Σ p ½‖x_j - b‖².
template <class T>
FMK_INLINE double add_columns_of(T* sum, const T* __restrict columns, const T* __restrict p, const T* base, int64_t n,
                                 int64_t dims) {
  double moment = 0;
  for (int64_t d = 0; d < dims; ++d) {
    const T at = base[d];
    const T* __restrict column = columns + d * n;
    double total = double(sum[d]);
    for (int64_t begin = 0; begin < n; begin += RUN) {
      const int64_t end = std::min(begin + RUN, n);
      T first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
      for (int64_t j = begin; j < end; ++j) {
        const T difference = column[j] - at;
        first += p[j] * difference, second += p[j] * difference * difference;
      }
      total += first, moment += 0.5 * second;
    }
    sum[d] = T(total);
  }
  return moment;
}

template <class T>
FMK_INLINE int64_t count_above_of(const T* s, T bar, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t j = 0; j < n; ++j) count += s[j] > bar;
  return count;
}

// out = e^(s - reference), where out may be s; adds to Σ out and Σ out ½‖x_j - c‖².
template <class T>
FMK_INLINE void exponentiate_of(T* out, const T* s, const T* __restrict halves, T reference, int64_t n, double& weight,
                                double& moment) {
  for (int64_t begin = 0; begin < n; begin += RUN) {
    const int64_t end = std::min(begin + RUN, n);
    T sum = 0, sum_halves = 0;
#pragma omp simd reduction(+ : sum, sum_halves)
    for (int64_t j = begin; j < end; ++j) {
      const T p = exponential(s[j] - reference);
      out[j] = p, sum += p, sum_halves += p * halves[j];
    }
    weight += sum, moment += sum_halves;
  }
}

template <class T>
FMK_INLINE void add_of(T* __restrict to, const T* __restrict from, T factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += factor * from[j];
}

template <class T>
FMK_INLINE void scale_of(T* to, T factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] *= factor;
}

// y = x - αc; returns ‖y‖² and y·c, of y as it was rounded.
template <class T>
FMK_INLINE std::pair<double, double> centre_of(T* __restrict y, const T* x, const T* c, double alpha, int64_t n) {
  double square = 0, dot = 0;
#pragma omp simd reduction(+ : square, dot)
  for (int64_t j = 0; j < n; ++j) {
    const double exact = double(x[j]) - alpha * double(c[j]);
    y[j] = T(exact);
    square += exact * exact, dot += double(y[j]) * double(c[j]);
  }
  return {square, dot};
}

// ‖x - α p‖² in double.
template <class T>
FMK_INLINE double squared_distance_of(const T* x, const T* p, double alpha, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const double d = double(x[j]) - alpha * double(p[j]);
    sum += d * d;
  }
  return sum;
}

// delta += e (p - star); returns Σ (p - star)².
template <class T>
FMK_INLINE double add_difference_of(double* __restrict delta, const T* p, const T* star, double e, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const double d = double(p[j]) - double(star[j]);
    delta[j] += e * d;
    sum += d * d;
  }
  return sum;
}

// What was added up about an origin: Σ (p x_i - offset origin) = acc, all of weight `weight`, counted `factor` times.
template <class T>
struct Added {
  const T *acc, *origin;
  double factor, weight, offset;
};

// mean = x* + Δ and residual = x - α(x* + Δ) with Δ = (delta + Σ p (x_i - x*)) / total; delta stands in double. Returns
// Σ Δ² and the part of Σ p ‖x_i - x*‖² that is more than the moment about the origin. acc may be `mean`.
template <class T>
FMK_INLINE std::pair<double, double> finish_of(T* mean, T* residual, const T* x, const T* star, const Added<T>& added,
                                               const double* delta, double alpha, double total, int64_t n) {
  double square = 0, more = 0;
  const T *acc = added.acc, *origin = added.origin;
  const double factor = added.factor, weight = added.weight, offset = added.offset;
#pragma omp simd reduction(+ : square, more)
  for (int64_t j = 0; j < n; ++j) {
    const double at = double(star[j]), o = double(origin[j]), sum = factor * double(acc[j]) - offset * o;
    const double d = (delta[j] + (sum - weight * (at - o))) / total;
    square += d * d, more += (at - o) * (weight * (at - o) - 2 * sum);
    residual[j] = T((double(x[j]) - alpha * at) - alpha * d);
    mean[j] = T(at + d);
  }
  return {square, more};
}

// target_clones does not reach through templates, hence a plain function for each type.
#define FMK_LOOPS(T, CLONES)                                                                                      \
  CLONES T to_logits(T* s, const T* halves, const T* weights, T scale, T square, int64_t n) {                     \
    return to_logits_of(s, halves, weights, scale, square, n);                                                    \
  }                                                                                                               \
  CLONES int64_t count_above(const T* s, T bar, int64_t n) { return count_above_of(s, bar, n); }                  \
  CLONES void exponentiate(T* out, const T* s, const T* halves, T reference, int64_t n, double& weight,           \
                           double& moment) {                                                                      \
    exponentiate_of(out, s, halves, reference, n, weight, moment);                                                \
  }                                                                                                               \
  CLONES void add(T* to, const T* from, T factor, int64_t n) { add_of(to, from, factor, n); }                     \
  CLONES void scale(T* to, T factor, int64_t n) { scale_of(to, factor, n); }                                      \
  CLONES double squared_distance(const T* x, const T* p, double alpha, int64_t n) {                               \
    return squared_distance_of(x, p, alpha, n);                                                                   \
  }                                                                                                               \
  CLONES double add_difference(double* delta, const T* p, const T* star, double e, int64_t n) {                   \
    return add_difference_of(delta, p, star, e, n);                                                               \
  }                                                                                                               \
  CLONES std::pair<double, double> centre(T* y, const T* x, const T* c, double alpha, int64_t n) {                \
    return centre_of(y, x, c, alpha, n);                                                                          \
  }                                                                                                               \
  CLONES std::pair<double, double> finish(T* mean, T* residual, const T* x, const T* star, const Added<T>& added, \
                                          const double* delta, double alpha, double total, int64_t n) {           \
    return finish_of(mean, residual, x, star, added, delta, alpha, total, n);                                     \
  }                                                                                                               \
  CLONES T from_differences(T* s, const T* columns, const T* weights, const T* r, const T* base, T half, T scale, \
                            int64_t n, int64_t dims) {                                                            \
    return from_differences_of(s, columns, weights, r, base, half, scale, n, dims);                               \
  }                                                                                                               \
  CLONES double add_columns(T* sum, const T* columns, const T* p, const T* base, int64_t n, int64_t dims) {       \
    return add_columns_of(sum, columns, p, base, n, dims);                                                        \
  }
FMK_LOOPS(float, FMK_CLONES)
FMK_LOOPS(double, FMK_CLONES)
#undef FMK_LOOPS

}  // namespace
}  // namespace fmk
