// runge_kutta_stage: y + h Σ a_j k_j and t₀ + c h, a step size for every row, in one pass.
#include "runge_kutta.h"

namespace fmk {
namespace {

constexpr int64_t MAX_ROWS = TILE / 4;  // of a tile

template <class C>
FMK_INLINE void add_any(C* first, C* second, const C* start, const C* start2, const C* const* k, const C* a, const C* b,
                        int64_t terms, int64_t count) {
  with_terms(terms, [&]<int M>() __attribute__((always_inline)) {
    [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      const C *const p[] = {k[J]...}, wa[] = {a[J]...};
      if (second) {
        const C wb[] = {b[J]...};
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          C x = start[i], z = start2[i];
          ((x += wa[J] * p[J][i], z += wb[J] * p[J][i]), ...);
          first[i] = x;
          second[i] = z;
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          C x = start[i];
          ((x += wa[J] * p[J][i]), ...);
          first[i] = x;
        }
      }
    }(std::make_integer_sequence<int, M>());
  });
}

// out = start + Σ a_j k_j in storage of half precision, converted in the loop: passes of their own would take as long
// again.
template <class T>
FMK_INLINE void add_half(T* out, const T* start, const T* const* k, const float* a, int64_t terms, int64_t count) {
  with_terms(terms, [&]<int M>() __attribute__((always_inline)) {
    [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      const T* const p[] = {k[J]...};
      const float wa[] = {a[J]...};
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        float x = to_float(start[i]);
        ((x += wa[J] * to_float(p[J][i])), ...);
        out[i] = from_float<T>(x);
      }
    }(std::make_integer_sequence<int, M>());
  });
}

// start + h x with the row's h
template <class C>
FMK_INLINE void scale_rows(C* out, const C* start, const C* x, const C* h, int64_t rows, int64_t columns) {
  with_columns(rows, columns, [&]<int D>() __attribute__((always_inline)) {
    for_elements<D>(rows, columns,
                    [&](int64_t r, int64_t j) __attribute__((always_inline)) { out[j] = start[j] + h[r] * x[j]; });
  });
}

// The stage's times of rows; target_clones does not reach through templates, hence plain functions a type.
template <class C>
FMK_INLINE void stage_times(C* t, C* h, const double* t0, const double* t1, double node, int64_t rows) {
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) {
    const double step = t1[r] - t0[r];
    h[r] = C(step);
    t[r] = C(node == 1 ? t1[r] : t0[r] + node * step);
  }
}

#define FMK_LOOPS(C)                                                                                     \
  FMK_CLONES void scale(C* out, const C* start, const C* x, const C* h, int64_t rows, int64_t columns) { \
    scale_rows(out, start, x, h, rows, columns);                                                         \
  }                                                                                                      \
  FMK_CLONES void times_of(C* t, C* h, const double* t0, const double* t1, double node, int64_t rows) {  \
    stage_times(t, h, t0, t1, node, rows);                                                               \
  }
FMK_LOOPS(float)
FMK_LOOPS(double)
#undef FMK_LOOPS

}  // namespace

#define FMK_ADD(C)                                                                                               \
  FMK_CLONES void add_terms(C* first, C* second, const C* start, const C* start2, const C* const* k, const C* a, \
                            const C* b, int64_t terms, int64_t count) {                                          \
    add_any(first, second, start, start2, k, a, b, terms, count);                                                \
  }
FMK_ADD(float)
FMK_ADD(double)
#undef FMK_ADD

FMK_CLONES void add_terms(bf16* out, const bf16* start, const bf16* const* k, const float* a, int64_t terms,
                          int64_t count) {
  add_half(out, start, k, a, terms, count);
}
FMK_CLONES void add_terms(f16* out, const f16* start, const f16* const* k, const float* a, int64_t terms,
                          int64_t count) {
  add_half(out, start, k, a, terms, count);
}

namespace {

struct Stage {
  const void* y;
  const double *t0, *t1, *coefficients;
  void *out, *t;
  int64_t rows, columns, nudge;
  bool narrow;
};

// C: arithmetic, and the type of the times.
template <class C>
void run(const Stage& s, const Terms& terms) {
  const Cut cut(s.rows, s.columns, TASK);
  const double node = s.coefficients[0], *weights = s.coefficients + 1;
  const bool direct = terms.type == scalar_type_of<C>, together = s.narrow;
  const bool in_half = !together && terms.in_half();
  parallel_for(0, cut.blocks(), 1, [&](int64_t begin, int64_t end) {
    alignas(64) C sums[TILE], state[TILE], h[MAX_ROWS], t[MAX_ROWS];
    C a[MAX_TERMS];
    for (int64_t j = 0; j < terms.count && together; ++j) a[j] = C(weights[j]);
    for (int64_t i = begin; i < end; ++i) {
      for_tiles(cut.block(i), [&](const Block& tile) {
        const double *t0 = s.t0 + tile.row, *t1 = s.t1 + tile.row;
        if (tile.first() || together) {
          times_of(t, h, t0, t1, node, tile.rows);
          for (int64_t r = 0; r < tile.rows && s.nudge != 0; ++r) {
            const double towards = std::copysign(HUGE_VAL, double(s.nudge) * (t1[r] - t0[r]));
            t[r] = std::nextafter(t[r], C(towards));
          }
          std::copy_n(t, tile.rows, static_cast<C*>(s.t) + tile.row);
        }
        const int64_t offset = tile.row * s.columns + tile.column, elements = tile.rows * tile.count;
        if (elements == 0) return;
        if constexpr (std::is_same_v<C, float>) {
          if (in_half) {
            for (int64_t r = 0; r < tile.rows; ++r) {
              const double step = t1[r] - t0[r];
              for (int64_t j = 0; j < terms.count; ++j) a[j] = float(step * weights[j]);
              add_in_half(s.out, s.y, a, terms, offset + r * tile.count, tile.count);
            }
            return;
          }
        }
        const C* y = staged(s.y, terms.type, offset, elements, state);
        C* out = direct ? static_cast<C*>(s.out) + offset : sums;
        if (together) {
          weighted_sums<C>(sums, nullptr, ZEROS<C>, a, nullptr, terms, offset, elements);
          scale(out, y, sums, h, tile.rows, tile.count);
        } else {
          for (int64_t r = 0; r < tile.rows; ++r) {
            const double step = t1[r] - t0[r];
            for (int64_t j = 0; j < terms.count; ++j) a[j] = C(step * weights[j]);
            const int64_t at = r * tile.count;
            weighted_sums<C>(out + at, nullptr, y + at, a, nullptr, terms, offset + at, tile.count);
          }
        }
        if (!direct) store(s.out, terms.type, offset, sums, elements);
      });
    }
  });
}

std::tuple<Tensor, Tensor> runge_kutta_stage(const Tensor& y, const std::vector<Tensor>& k, const Tensor& times,
                                             int64_t step, const Tensor& coefficients, int64_t row, int64_t nudge) {
  Contiguous contiguous;
  Terms terms{y.scalar_type(), y.numel()};
  for (const Tensor& k_j : k) terms.add(k_j, contiguous);
  const bool wide = terms.type == ScalarType::Double;
  Sizes rows = times.sizes();
  rows = Sizes(rows.data() + 1, rows.size() - 1);
  const int64_t count = rows.size() > 0 ? rows[0] : 1;
  FMK_CHECK(times.scalar_type() == ScalarType::Double && rows.size() < 2, "expected float64 times [R] or [R, B]");
  FMK_CHECK(step >= 0 && step + 1 < times.size(0), "step: out of range: ", step);
  FMK_CHECK(coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2 &&
                coefficients.size(1) == 1 + terms.count && row >= 0 && row < coefficients.size(0),
            "expected float64 coefficients [rows, 1 + len(k)]");
  FMK_CHECK(rows.size() == 0 || (y.dim() > 0 && y.size(0) == count), "times: expected a column for each row of y");

  const int64_t columns = count > 0 ? terms.elements / count : 0;
  Tensor out = empty_as(y), t = empty_as(y, rows, wide ? ScalarType::Double : ScalarType::Float);
  const double* t0 = static_cast<const double*>(contiguous(times)) + step * count;
  const Stage stage{
      contiguous(y),
      t0,
      t0 + count,
      static_cast<const double*>(contiguous(coefficients)) + row * (1 + terms.count),
      out.mutable_data_ptr(),
      t.mutable_data_ptr(),
      count,
      columns,
      nudge,
      rows.size() > 0 && columns < NARROW,
  };
  wide ? run<double>(stage, terms) : run<float>(stage, terms);
  return {out, t};
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("runge_kutta_stage", TORCH_BOX(&fmk::runge_kutta_stage)); }
