// conditional_flow: a point of a conditional path and its velocity in one pass.
//
// Rounded as written: a program that changes one import must find its numbers again, to the bit.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "stage.h"
#include "tile.h"

namespace fmk {
namespace {

enum Form : int64_t { LINEAR, TARGET, BRIDGE, TRIGONOMETRIC, AFFINE, FORMS };

// T: storage. C: arithmetic. Coefficients: a row of four a row.
template <int FORM, class T, class C>
FMK_INLINE void flow_rows(T* __restrict x_t, T* __restrict u_t, const T* __restrict x0, const T* __restrict x1,
                          const T* __restrict noise, const C* __restrict coefficients, int64_t rows, int64_t columns) {
  const C half_pi = C(1.57079632679489661923);
  with_columns(rows, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < rows; ++r) {
      const C* row = coefficients + 4 * r;
      const C a = row[0], b = row[1], s = row[2], c = row[3];
      for (int64_t j = r * n; j < r * n + n; ++j) {
        const C source = C(to_float(x0[j])), data = C(to_float(x1[j]));
        const C mean = FORM == TARGET ? a * data : a * data + b * source;
        C x = mean, u;
        if constexpr (FORM != AFFINE) x = mean + s * C(to_float(noise[j]));
        if constexpr (FORM == LINEAR) {
          u = data - source;
        } else if constexpr (FORM == TARGET) {
          u = (data - b * x) / c;
        } else if constexpr (FORM == BRIDGE) {
          u = c * (x - mean) + data - source;
        } else if constexpr (FORM == TRIGONOMETRIC) {
          u = half_pi * (b * data - a * source);
        } else {
          u = s * data + c * source;
        }
        x_t[j] = from_float<T>(x);
        u_t[j] = from_float<T>(u);
      }
    }
  });
}

// target_clones does not reach through templates, hence a plain function a combination.
#define FMK_FLOW_FORM(FORM, T, C)                                                                              \
  FMK_CLONES void flow_##FORM(T* x_t, T* u_t, const T* x0, const T* x1, const T* noise, const C* coefficients, \
                              int64_t rows, int64_t columns) {                                                 \
    flow_rows<FORM>(x_t, u_t, x0, x1, noise, coefficients, rows, columns);                                     \
  }
#define FMK_FLOW(T, C)               \
  FMK_FLOW_FORM(LINEAR, T, C)        \
  FMK_FLOW_FORM(TARGET, T, C)        \
  FMK_FLOW_FORM(BRIDGE, T, C)        \
  FMK_FLOW_FORM(TRIGONOMETRIC, T, C) \
  FMK_FLOW_FORM(AFFINE, T, C)
FMK_FLOW(float, float)
FMK_FLOW(double, double)
FMK_FLOW(bf16, float)
FMK_FLOW(f16, float)
#undef FMK_FLOW
#undef FMK_FLOW_FORM

template <class T, class C>
void flow(int64_t form, T* x_t, T* u_t, const T* x0, const T* x1, const T* noise, const C* coefficients, int64_t rows,
          int64_t columns) {
  switch (form) {
    case LINEAR:
      return flow_LINEAR(x_t, u_t, x0, x1, noise, coefficients, rows, columns);
    case TARGET:
      return flow_TARGET(x_t, u_t, x0, x1, noise, coefficients, rows, columns);
    case BRIDGE:
      return flow_BRIDGE(x_t, u_t, x0, x1, noise, coefficients, rows, columns);
    case TRIGONOMETRIC:
      return flow_TRIGONOMETRIC(x_t, u_t, x0, x1, noise, coefficients, rows, columns);
    default:
      return flow_AFFINE(x_t, u_t, x0, x1, noise, coefficients, rows, columns);
  }
}

std::tuple<Tensor, Tensor> conditional_flow(const Tensor& x0_in, const Tensor& x1_in,
                                            const std::optional<Tensor>& noise_in, const Tensor& coefficients_in,
                                            int64_t form) {
  const Tensor x0 = as_contiguous(x0_in), x1 = as_contiguous(x1_in), coefficients = as_contiguous(coefficients_in);
  const std::optional<Tensor> noise = as_contiguous(noise_in);
  FMK_CHECK(form >= 0 && form < FORMS, "form: out of range: ", form);
  FMK_CHECK(noise.has_value() == (form != AFFINE), "noise: missing, or one too many");
  FMK_CHECK(x1.dim() > 0, "x1: expected at least one dimension");
  const int64_t rows = x1.size(0), elements = x1.numel();
  FMK_CHECK(x0.numel() == elements && (!noise || noise->numel() == elements), "x0, x1 and noise differ in size");
  FMK_CHECK(coefficients.numel() == 4 * rows, "coefficients: expected [", rows, ", 4]");
  Tensor x_t = empty_as(x1), u_t = empty_as(x1);
  if (elements == 0) return {x_t, u_t};
  const Cut cut(rows, elements / rows, TASK);
  dispatch(x1.scalar_type(), [&]<class T>() {
    using C = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T *source = data<const T>(x0), *target = data<const T>(x1);
    const T* normals = noise ? data<const T>(*noise) : source;  // of "affine" not read
    const C* table = data<const C>(coefficients);
    T *x = data<T>(x_t), *u = data<T>(u_t);
    parallel_for(0, cut.blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Block task = cut.block(i);
        const int64_t at = task.row * cut.columns + task.column;
        flow(form, x + at, u + at, source + at, target + at, normals + at, table + 4 * task.row, task.rows, task.count);
      }
    });
  });
  return {x_t, u_t};
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("conditional_flow", TORCH_BOX(&fmk::conditional_flow)); }
