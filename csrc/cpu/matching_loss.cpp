// matching_loss: residual, loss and gradient in one pass over the prediction; and the gradient's scale in the backward.
#include <cmath>

#include "math/rho.h"
#include "noise.h"
#include "stage.h"
#include "torch/loss.h"
#include "torch/path.h"

namespace fmk {
namespace {

constexpr int64_t MAX_ROWS = TILE / 4;  // of a tile: a row takes at least one group

// The table's coefficients of a tile's rows; `slope` multiplies ρ'(r) in the gradient.
template <class C>
struct RowCoefficients {
  alignas(64) C p[MAX_ROWS], a[MAX_ROWS], b[MAX_ROWS], c[MAX_ROWS], slope[MAX_ROWS];
  double w[MAX_ROWS];
};

// r = p·prediction + a·x1 + b·x0 + c·z; a null tensor is a term that the residual lacks.
template <class C>
FMK_INLINE void residual_rows(C* __restrict out, const RowCoefficients<C>& rows, const C* __restrict prediction,
                              const C* __restrict x1, const C* __restrict x0, const C* __restrict z, int64_t count,
                              int64_t columns) {
  with_columns(count, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < count; ++r) {
      const C p = rows.p[r], a = rows.a[r], b = rows.b[r], c = rows.c[r];
      if (x1 && x0) {
        for (int64_t j = r * n; j < r * n + n; ++j) out[j] = p * prediction[j] + a * x1[j] + b * x0[j];
      } else if (x1) {
        for (int64_t j = r * n; j < r * n + n; ++j) out[j] = p * prediction[j] + a * x1[j];
      } else if (x0) {
        for (int64_t j = r * n; j < r * n + n; ++j) out[j] = p * prediction[j] + b * x0[j];
      } else {
        for (int64_t j = r * n; j < r * n + n; ++j) out[j] = p * prediction[j];
      }
      if (z) {
        for (int64_t j = r * n; j < r * n + n; ++j) out[j] += c * z[j];
      }
    }
  });
}

// Σ ρ(r) of each row. The lanes of a vector sum apart and are added in a fixed order.
template <int KIND, class C>
FMK_INLINE void rho_rows(C* __restrict sums, C k, const C* __restrict residual, int64_t count, int64_t columns) {
  with_columns(count, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < count; ++r) {
      C sum = 0;
      if constexpr (D > 0) {
        for (int64_t j = 0; j < D; ++j) sum += rho(KIND, k, residual[r * D + j]);
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = r * n; j < r * n + n; ++j) sum += rho(KIND, k, residual[j]);
      }
      sums[r] = sum;
    }
  });
}

template <int KIND, class C>
FMK_INLINE void slope_rows(C* __restrict out, const RowCoefficients<C>& rows, C k, const C* __restrict residual,
                           int64_t count, int64_t columns) {
  with_columns(count, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < count; ++r) {
      const C slope = rows.slope[r];
      for (int64_t j = r * n; j < r * n + n; ++j) out[j] = slope * d_rho(KIND, k, residual[j]);
    }
  });
}

// Residual, Σ r² and gradient at once for the commonest loss: the residual never leaves the registers. `out` may be
// null.
template <class C>
FMK_INLINE void square_rows(C* __restrict out, C* __restrict sums, const RowCoefficients<C>& rows,
                            const C* __restrict prediction, const C* __restrict x1, const C* __restrict x0,
                            int64_t count, int64_t columns) {
  with_columns(count, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < count; ++r) {
      const C p = rows.p[r], a = rows.a[r], b = rows.b[r], slope = C(2) * rows.slope[r];
      C sum = 0;
      if (out) {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = r * n; j < r * n + n; ++j) {
          const C residual = p * prediction[j] + a * x1[j] + b * x0[j];
          sum += residual * residual;
          out[j] = slope * residual;
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = r * n; j < r * n + n; ++j) {
          const C residual = p * prediction[j] + a * x1[j] + b * x0[j];
          sum += residual * residual;
        }
      }
      sums[r] = sum;
    }
  });
}

template <class C>
FMK_INLINE void multiply_rows(C* __restrict x, const C* __restrict by, int64_t step, int64_t count, int64_t columns) {
  with_columns(count, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = r * n; j < r * n + n; ++j) x[j] *= by[r * step];
    }
  });
}

// target_clones does not reach through templates, hence a plain function a type.
#define FMK_LOOPS(C, CLONES)                                                                                          \
  CLONES void residuals(C* out, const RowCoefficients<C>& rows, const C* prediction, const C* x1, const C* x0,        \
                        const C* z, int64_t count, int64_t columns) {                                                 \
    residual_rows(out, rows, prediction, x1, x0, z, count, columns);                                                  \
  }                                                                                                                   \
  CLONES void squares(C* out, C* sums, const RowCoefficients<C>& rows, const C* prediction, const C* x1, const C* x0, \
                      int64_t count, int64_t columns) {                                                               \
    square_rows(out, sums, rows, prediction, x1, x0, count, columns);                                                 \
  }                                                                                                                   \
  CLONES void rho_sums(C* sums, int kind, C k, const C* residual, int64_t count, int64_t columns) {                   \
    if (kind == RHO_SQUARE) return rho_rows<RHO_SQUARE>(sums, k, residual, count, columns);                           \
    if (kind == RHO_ABSOLUTE) return rho_rows<RHO_ABSOLUTE>(sums, k, residual, count, columns);                       \
    rho_rows<RHO_PSEUDO_HUBER>(sums, k, residual, count, columns);                                                    \
  }                                                                                                                   \
  CLONES void slopes(C* out, const RowCoefficients<C>& rows, int kind, C k, const C* residual, int64_t count,         \
                     int64_t columns) {                                                                               \
    if (kind == RHO_SQUARE) return slope_rows<RHO_SQUARE>(out, rows, k, residual, count, columns);                    \
    if (kind == RHO_ABSOLUTE) return slope_rows<RHO_ABSOLUTE>(out, rows, k, residual, count, columns);                \
    slope_rows<RHO_PSEUDO_HUBER>(out, rows, k, residual, count, columns);                                             \
  }                                                                                                                   \
  CLONES void multiply(C* x, const C* by, int64_t step, int64_t count, int64_t columns) {                             \
    multiply_rows(x, by, step, count, columns);                                                                       \
  }
FMK_LOOPS(float, FMK_CLONES)
FMK_LOOPS(double, )
#undef FMK_LOOPS

// Calls f(first, last, kept) for the runs of elements [offset, offset + count) that one value of the mask covers.
template <class F>
void for_runs(const bool* mask, int64_t cover, int64_t offset, int64_t count, F&& f) {
  for (int64_t i = 0; i < count;) {
    const int64_t at = (offset + i) / cover, end = std::min(count, (at + 1) * cover - offset);
    f(i, end, mask[at]);
    i = end;
  }
}

// Zero where the mask is false: selected, never multiplied.
template <class C>
void select(C* x, const bool* mask, int64_t cover, int64_t offset, int64_t count) {
  if (cover == 1) {
    for (int64_t i = 0; i < count; ++i) x[i] = mask[offset + i] ? x[i] : C(0);
    return;
  }
  for_runs(mask, cover, offset, count, [&](int64_t first, int64_t last, bool kept) {
    if (!kept) std::fill(x + first, x + last, C(0));
  });
}

int64_t kept_of(const bool* mask, int64_t cover, int64_t offset, int64_t count) {
  int64_t total = 0;
  for_runs(mask, cover, offset, count,
           [&](int64_t first, int64_t last, bool kept) { total += kept ? last - first : 0; });
  return total;
}

struct Loss {
  uint64_t seed;
  int64_t rows, columns, first_row, terms;
  ScalarType prediction_type, type;  // of the prediction and its gradient; of x1, x0 and z
  const void *prediction, *x1, *x0, *z;
  void* gradient;  // null where none is wanted
  const bool* mask;
  int64_t cover;
  int rho;
  double rho_k;
  int64_t reduction;
  double gradient_factor;
};

struct Partial {
  double sum = 0;
  int64_t kept = 0;
};

// Noise of a tile in C, drawn in the arithmetic type of `type` and rounded to it.
template <class C>
void draw(C* out, const Loss& l, const Block& tile, Stream stream) {
  if constexpr (std::is_same_v<C, double>) {
    if (l.type != ScalarType::Double) {
      alignas(64) float narrow[TILE];
      normals(narrow, l.seed, l.first_row, tile, stream_word(stream, 0), l.type);
      std::copy_n(narrow, tile.rows * tile.count, out);
      return;
    }
  }
  normals(out, l.seed, l.first_row, tile, stream_word(stream, 0), l.type);
}

// T: the table. C: arithmetic. Partials come one a row part for `none`, else one a task with the row weights applied.
template <class T, class C>
void run(const Loss& l, const Cut& cut, const T* table, const T* weight, Partial* partials) {
  const bool direct = l.prediction_type == scalar_type_of<C>;
  parallel_for(0, cut.blocks(), 1, [&](int64_t begin, int64_t end) {
    alignas(64) C prediction[TILE], data[TILE], noise[TILE], bridge[TILE], residual[TILE], converted[TILE];
    alignas(64) C sums[MAX_ROWS];
    RowCoefficients<C> rows;
    for (int64_t i = begin; i < end; ++i) {
      Partial task_partial;
      for_tiles(cut.block(i), [&](const Block& tile) {
        const int64_t offset = tile.row * l.columns + tile.column, elements = tile.rows * tile.count;
        for (int64_t r = 0; r < tile.rows; ++r) {
          const T* c = table + TABLE_COLUMNS * (tile.row + r);
          rows.p[r] = C(c[0]), rows.a[r] = C(c[1]), rows.b[r] = C(c[2]), rows.c[r] = C(c[3]);
          rows.w[r] = double(c[4]) * (weight ? double(weight[tile.row + r]) : 1.0);
          rows.slope[r] = C(rows.w[r]) * C(c[0]) * C(l.gradient_factor);
        }
        const C* p = staged<C>(l.prediction, l.prediction_type, offset, elements, prediction);
        const C* x1 = l.terms & TERM_X1 ? staged<C>(l.x1, l.type, offset, elements, data) : nullptr;
        const C* x0 = l.terms & TERM_X0 ? staged<C>(l.x0, l.type, offset, elements, noise) : nullptr;
        const C* z = l.terms & TERM_Z ? staged<C>(l.z, l.type, offset, elements, bridge) : nullptr;
        if (l.terms & TERM_X0 && !x0) draw(noise, l, tile, STREAM_X0), x0 = noise;
        if (l.terms & TERM_Z && !z) draw(bridge, l, tile, STREAM_BRIDGE), z = bridge;

        C* out = !l.gradient ? nullptr : direct ? static_cast<C*>(l.gradient) + offset : converted;
        if (l.rho == RHO_SQUARE && x1 && x0 && !z && !l.mask) {
          squares(out, sums, rows, p, x1, x0, tile.rows, tile.count);
        } else {
          residuals(residual, rows, p, x1, x0, z, tile.rows, tile.count);
          if (l.mask) select(residual, l.mask, l.cover, offset, elements);
          rho_sums(sums, l.rho, C(l.rho_k), residual, tile.rows, tile.count);
          if (out) slopes(out, rows, l.rho, C(l.rho_k), residual, tile.rows, tile.count);
          if (out && l.mask) select(out, l.mask, l.cover, offset, elements);
        }
        if (out && !direct) store(l.gradient, l.prediction_type, offset, converted, elements);
        if (l.reduction == REDUCE_NONE) {
          for (int64_t r = 0; r < tile.rows; ++r) {
            Partial& of_row = partials[(tile.row + r) * cut.spans + tile.column / cut.span];
            of_row.sum += double(sums[r]);
            of_row.kept += l.mask ? kept_of(l.mask, l.cover, offset + r * tile.count, tile.count) : tile.count;
          }
        } else {
          double sum = 0;
          for (int64_t r = 0; r < tile.rows; ++r) sum += rows.w[r] * double(sums[r]);
          task_partial.sum += sum;
          task_partial.kept += l.mask ? kept_of(l.mask, l.cover, offset, elements) : elements;
        }
      });
      if (l.reduction != REDUCE_NONE) partials[i] = task_partial;
    }
  });
}

// The gradient is stored before the division by the element count where the quotient would underflow (float16) or the
// count is not known yet (mask); see gradient_factor in fmkernels/ops/matching_loss.py.
double factor_in_forward(const Loss& l) {
  const bool divide = l.reduction == REDUCE_MEAN && !l.mask && l.prediction_type != ScalarType::Half;
  return divide ? 1.0 / double(std::max<int64_t>(l.rows * l.columns, 1)) : 1.0;
}

template <class T, class C>
void finish(const Loss& l, const Cut& cut, const T* table, const T* weight, C* loss, C* denominator) {
  const bool none = l.reduction == REDUCE_NONE;
  std::vector<Partial> partials(none ? l.rows * cut.spans : cut.blocks());
  if (l.columns > 0) run<T, C>(l, cut, table, weight, partials.data());
  if (none) {
    for (int64_t row = 0; row < l.rows; ++row) {
      Partial of_row;
      for (int64_t s = 0; s < cut.spans; ++s) {
        of_row.sum += partials[row * cut.spans + s].sum;
        of_row.kept += partials[row * cut.spans + s].kept;
      }
      const double w = double(table[TABLE_COLUMNS * row + 4]) * (weight ? double(weight[row]) : 1.0);
      const double count = double(std::max<int64_t>(of_row.kept, 1));
      loss[row] = C(w * of_row.sum / count);
      if (denominator) denominator[row] = C(count);
    }
    return;
  }
  Partial total;
  for (const Partial& p : partials) total.sum += p.sum, total.kept += p.kept;
  const double count = double(std::max<int64_t>(total.kept, 1));
  loss[0] = C(l.reduction == REDUCE_MEAN ? total.sum / count : total.sum);
  if (denominator) denominator[0] = C(count);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& prediction_in, const Tensor& x1_in,
                                           const std::optional<Tensor>& x0_in, const std::optional<Tensor>& z_in,
                                           const Tensor& table_in, const std::optional<Tensor>& weight_in,
                                           const std::optional<Tensor>& mask_in, const Tensor& key, int64_t first_row,
                                           int64_t terms, int64_t rho, double rho_k, int64_t reduction, bool gradient) {
  const Tensor prediction = as_contiguous(prediction_in), x1 = as_contiguous(x1_in), table = as_contiguous(table_in);
  const auto x0 = as_contiguous(x0_in), z = as_contiguous(z_in), weight = as_contiguous(weight_in),
             mask = as_contiguous(mask_in);
  FMK_CHECK(prediction.numel() == x1.numel(), "prediction and x1 differ in size");
  const bool wide = prediction.scalar_type() == ScalarType::Double || x1.scalar_type() == ScalarType::Double ||
                    table.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = table.numel() / TABLE_COLUMNS;

  Sizes sizes = table.sizes();
  sizes = Sizes(sizes.data(), reduction == REDUCE_NONE ? sizes.size() - 1 : 0);
  const int64_t empty[] = {0};
  const bool divides = gradient && mask && reduction != REDUCE_SUM;
  Tensor loss = empty_as(x1, sizes, type);
  Tensor slopes = gradient ? empty_as(prediction) : empty_as(prediction, Sizes(empty, 1));
  Tensor denominator = empty_as(x1, divides ? sizes : Sizes(empty, 1), type);

  Loss l{uint64_t(*data<const int64_t>(key)),
         rows,
         rows > 0 ? x1.numel() / rows : 0,
         first_row,
         terms,
         prediction.scalar_type(),
         x1.scalar_type(),
         pointer(prediction),
         pointer(x1),
         pointer(x0),
         pointer(z),
         gradient ? slopes.mutable_data_ptr() : nullptr,
         data<const bool>(mask),
         mask && mask->numel() > 0 ? x1.numel() / mask->numel() : 1,
         int(rho),
         rho_k,
         reduction,
         1.0};
  l.gradient_factor = factor_in_forward(l);
  const Cut cut(l.rows, l.columns, TASK);
  const auto launch = [&]<class T, class C>() {
    finish<T, C>(l, cut, data<const T>(table), data<const T>(weight), data<C>(loss),
                 divides ? data<C>(denominator) : nullptr);
  };
  if (table.scalar_type() == ScalarType::Double) {
    launch.operator()<double, double>();
  } else if (wide) {
    launch.operator()<float, double>();
  } else {
    launch.operator()<float, float>();
  }
  return {loss, slopes, denominator};
}

Tensor matching_loss(const Tensor& prediction, const Tensor& x1, const std::optional<Tensor>& x0,
                     const std::optional<Tensor>& z, const Tensor& table, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& mask, const Tensor& key, int64_t first_row, int64_t terms,
                     int64_t rho, double rho_k, int64_t reduction) {
  return std::get<0>(
      forward(prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction, false));
}

// One factor for all, without a buffer between: out may be the gradient itself.
template <class T, class C>
FMK_INLINE void scale_run(const T* gradient, T* out, int64_t elements, C factor) {
#pragma omp simd
  for (int64_t j = 0; j < elements; ++j) out[j] = from_float<T>(C(to_float(gradient[j])) * factor);
}

// target_clones does not reach through templates.
#define FMK_SCALE(T, C)                                                              \
  FMK_CLONES void scale_all(const T* gradient, T* out, int64_t elements, C factor) { \
    scale_run(gradient, out, elements, factor);                                      \
  }
FMK_SCALE(float, float)
FMK_SCALE(double, double)
FMK_SCALE(bf16, float)
FMK_SCALE(f16, float)
#undef FMK_SCALE

// out = gradient · scale · factor / denominator, a scale for each row or one for all; memory is left alone where that
// is the gradient itself.
template <class C>
void scale_rows(const void* gradient, void* out, ScalarType type, int64_t rows, int64_t columns, const C* scale,
                int64_t scales, const C* denominator, double factor) {
  std::vector<C> factors(scales);
  for (int64_t i = 0; i < scales; ++i) factors[i] = scale[i] * C(factor) / (denominator ? denominator[i] : C(1));
  if (gradient == out && scales == 1 && factors[0] == C(1)) return;
  const Cut cut(rows, columns, TASK);
  if (scales == 1 && (std::is_same_v<C, float> || type == ScalarType::Double)) {
    dispatch(type, [&]<class T>() {
      if constexpr (std::is_same_v<T, double> == std::is_same_v<C, double>) {
        parallel_for(0, columns > 0 ? cut.blocks() : 0, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const Block task = cut.block(i);
            scale_all(static_cast<const T*>(gradient) + task.column, static_cast<T*>(out) + task.column, task.count,
                      factors[0]);
          }
        });
      }
    });
    return;
  }
  parallel_for(0, columns > 0 ? cut.blocks() : 0, 1, [&](int64_t begin, int64_t end) {
    alignas(64) C buffer[TILE];
    for (int64_t i = begin; i < end; ++i) {
      for_tiles(cut.block(i), [&](const Block& tile) {
        const int64_t offset = tile.row * columns + tile.column, elements = tile.rows * tile.count;
        load(buffer, gradient, type, offset, elements);
        const int64_t step = scales == 1 ? 0 : 1;
        multiply(buffer, factors.data() + step * tile.row, step, tile.rows, tile.count);
        store(out, type, offset, buffer, elements);
      });
    }
  });
}

void scale_into(const Tensor& gradient, Tensor& out, const Tensor& scale_in, const Tensor& denominator_in,
                double factor) {
  const Tensor scale = as_contiguous(scale_in), denominator = as_contiguous(denominator_in);
  const int64_t scales = scale.numel(), rows = std::max<int64_t>(scales, 1);
  const int64_t columns = scales > 0 ? gradient.numel() / rows : 0;
  const bool wide = gradient.scalar_type() == ScalarType::Double || scale.scalar_type() == ScalarType::Double;
  const auto launch = [&]<class C>() {
    std::vector<C> s(scales), d(denominator.numel());
    load(s.data(), pointer(scale), scale.scalar_type(), 0, scales);
    load(d.data(), pointer(denominator), denominator.scalar_type(), 0, int64_t(d.size()));
    scale_rows<C>(pointer(gradient), out.mutable_data_ptr(), gradient.scalar_type(), rows, columns, s.data(), scales,
                  d.empty() ? nullptr : d.data(), factor);
  };
  wide ? launch.operator()<double>() : launch.operator()<float>();
}

Tensor scale_gradient(const Tensor& gradient_in, const Tensor& scale, const Tensor& denominator, double factor) {
  const Tensor gradient = as_contiguous(gradient_in);
  Tensor out = empty_as(gradient);
  scale_into(gradient, out, scale, denominator, factor);
  return out;
}

void scale_gradient_(Tensor gradient, const Tensor& scale, const Tensor& denominator, double factor) {
  FMK_CHECK(gradient.is_contiguous(), "expected a contiguous gradient");
  scale_into(gradient, gradient, scale, denominator, factor);
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) {
  m.impl("matching_loss", TORCH_BOX(&fmk::matching_loss));
  m.impl("_matching_loss_forward", TORCH_BOX(&fmk::forward));
  m.impl("_scale_gradient", TORCH_BOX(&fmk::scale_gradient));
  m.impl("_scale_gradient_", TORCH_BOX(&fmk::scale_gradient_));
}
