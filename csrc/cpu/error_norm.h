// The loops of the error norm of a Runge–Kutta step, and the check that its solution is finite.
#pragma once

#include "math/macros.h"
#include "runge_kutta.h"

namespace fmk {

// A magnitude as an integer: from INFINITE_BITS on it is infinite or NaN.
template <class C>
using Bits = std::conditional_t<std::is_same_v<C, float>, int32_t, int64_t>;
template <class C>
constexpr Bits<C> INFINITE_BITS = std::is_same_v<C, float> ? Bits<C>(0x7f800000) : Bits<C>(0x7ff0000000000000);

// What an element adds to Σ (e / (atol + rtol max(|y|, |y₁|)))², and to the largest magnitude of y₁ as an integer.
template <class C>
FMK_INLINE void add_element(C& sum, Bits<C>& largest, C y, C y1, C e, C rtol, C atol) {
  const C before = fabs(y), after = fabs(y1), scaled = e / (atol + rtol * (after > before ? after : before));
  const Bits<C> bits = bit_cast<Bits<C>>(after);
  sum += scaled * scaled;
  largest = bits > largest ? bits : largest;
}

// y₁ = y + h y₁ and the two sums over each row, with a step size and tolerances a row.
template <class C>
FMK_INLINE void norm_rows(C* squares, Bits<C>* largest, C* y1, const C* e, const C* y, const C* h, const C* rtol,
                          const C* atol, int64_t rows, int64_t columns) {
  with_columns(rows, columns, [&]<int D>() __attribute__((always_inline)) {
    const auto add = [&](C& sum, Bits<C>& most, int64_t r, int64_t j) __attribute__((always_inline)) {
      y1[j] = y[j] + h[r] * y1[j];
      add_element(sum, most, y[j], y1[j], h[r] * e[j], rtol[r], atol[r]);
    };
    if constexpr (D > 0) {
#pragma omp simd
      for (int64_t r = 0; r < rows; ++r) {
        C sum = 0;
        Bits<C> most = 0;
        [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
          (add(sum, most, r, r * D + J), ...);
        }(std::make_integer_sequence<int, D>());
        squares[r] = sum, largest[r] = most;
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        C sum = 0;
        Bits<C> most = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most)
        for (int64_t j = 0; j < columns; ++j) add(sum, most, r, r * columns + j);
        squares[r] = sum, largest[r] = most;
      }
    }
  });
}

// The same of one row with the last terms of y₁ and e: the error never leaves the registers. y and k may be in half
// precision; `start` and `start2` where all terms are the last ones are y and zero.
template <bool ALL, class C, class T>
FMK_INLINE void norm_row(C& squares, Bits<C>& largest, C* y1, const C* start, const C* start2, const T* y,
                         const T* const* k, const C* a, const C* b, C rtol, C atol, int64_t terms, int64_t count) {
  with_terms(terms, [&]<int M>() __attribute__((always_inline)) {
    [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      const T* const p[] = {k[J]...};
      const C wa[] = {a[J]...}, wb[] = {b[J]...};
      C sum = 0;
      Bits<C> most = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most)
      for (int64_t i = 0; i < count; ++i) {
        const C from = C(to_float(y[i]));
        C x = ALL ? from : start[i], z = ALL ? C(0) : start2[i];
        ((x += wa[J] * C(to_float(p[J][i])), z += wb[J] * C(to_float(p[J][i]))), ...);
        add_element(sum, most, from, x, z, rtol, atol);
        y1[i] = x;
      }
      squares = sum, largest = most;
    }(std::make_integer_sequence<int, M>());
  });
}

// The error ratios and whether the solutions are finite, as step control takes them.
template <class C>
FMK_INLINE void finish_rows(double* ratio, int32_t* finite, const C* squares, const Bits<C>* largest, C columns,
                            int64_t rows) {
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) ratio[r] = double(C(sqrt(squares[r] / columns)));
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) finite[r] = largest[r] < INFINITE_BITS<C>;
}

template <class C>
FMK_INLINE Bits<C> magnitude_of(const C* y1, int64_t count) {
  Bits<C> largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < count; ++j) largest = std::max(largest, bit_cast<Bits<C>>(fabs(y1[j])));
  return largest;
}

// (e / tolerance)² of each number of a part of a row, in place; complex numbers are pairs of columns.
template <int COMPONENTS, bool SHARED, class C>
FMK_INLINE void square_loop(C* e, const C* y, const C* y1, const double* rtol, const double* atol, int64_t rtol_step,
                            int64_t atol_step, int64_t count) {
  const auto magnitude = [](const C* z, int64_t j) __attribute__((always_inline)) {
    if constexpr (COMPONENTS == 2) return sqrt(z[2 * j] * z[2 * j] + z[2 * j + 1] * z[2 * j + 1]);
    return fabs(z[COMPONENTS * j]);
  };
  const double shared_rtol = rtol[0], shared_atol = atol[0];
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const C before = magnitude(y, j), after = magnitude(y1, j);
    const double relative = SHARED ? shared_rtol : rtol[j * rtol_step];
    const double absolute = SHARED ? shared_atol : atol[j * atol_step];
    const C scaled = magnitude(e, j) / C(absolute + relative * double(after > before ? after : before));
    e[j] = scaled * scaled;
  }
}
template <class C>
FMK_INLINE void square_row(C* e, const C* y, const C* y1, const double* rtol, const double* atol, int64_t rtol_step,
                           int64_t atol_step, int64_t components, int64_t count) {
  if (components == 1 && rtol_step == 0 && atol_step == 0) {
    square_loop<1, true>(e, y, y1, rtol, atol, 0, 0, count);
  } else if (components == 1) {
    square_loop<1, false>(e, y, y1, rtol, atol, rtol_step, atol_step, count);
  } else {
    square_loop<2, false>(e, y, y1, rtol, atol, rtol_step, atol_step, count);
  }
}

template <class C>
FMK_INLINE C sum_of(const C* x, int64_t count) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += x[j];
  return sum;
}

}  // namespace fmk
