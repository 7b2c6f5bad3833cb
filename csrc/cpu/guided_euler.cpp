// guided_euler: x + h (v_u + w (v_c - v_u)) in one pass; with rescaling the spread of each row is taken first.
//
// Rounded as written: an unguided step must be x + h v as a program in plain PyTorch rounds it, to the bit.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "math/guidance.h"
#include "stage.h"
#include "tile.h"

namespace fmk {
namespace {

constexpr int64_t MAX_ROWS = TILE / 4;  // of a tile: a row takes at least one group

template <class C>
struct RowCoefficients {
  alignas(64) C h[MAX_ROWS], w[MAX_ROWS];
};

// X: storage of x and x'. V: of the velocities. C: arithmetic. Half precision is converted in the loop: a pass of its
// own would take as long again.
template <class X, class V, class C>
FMK_INLINE void step_rows(X* __restrict out, const RowCoefficients<C>& rows, const X* __restrict x,
                          const V* __restrict c, const V* __restrict u, int64_t count, int64_t columns) {
  with_columns(count, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < count; ++r) {
      const C h = rows.h[r], w = rows.w[r];
      const bool near_u = nearer_unconditional(w);
      const V* nearer = near_u ? u : c;  // of a long row; short ones select by element, to vectorise over rows
      for (int64_t j = r * n; j < r * n + n; ++j) {
        const C from = C(to_float(D ? (near_u ? u[j] : c[j]) : nearer[j]));
        const C v = guided_velocity(w, from, C(to_float(c[j])), C(to_float(u[j])));
        out[j] = from_float<X>(C(to_float(x[j])) + h * v);
      }
    }
  });
}

// Adds the moments of v_c and of the guided velocity to a pair a row. Deviations are taken from the first value, then
// from the mean: those of equal values are exactly 0.
template <class V, class C>
FMK_INLINE void measure_rows(Moments* pairs, const C* w, const V* __restrict c, const V* __restrict u, int64_t count,
                             int64_t columns) {
  alignas(64) C of_c[TILE], of_v[TILE];
  for (int64_t r = 0; r < count; ++r, c += columns, u += columns) {
    const C guidance = w[r], first_c = C(to_float(c[0])), first_u = C(to_float(u[0]));
    const V* nearer = nearer_unconditional(guidance) ? u : c;
    const C first_v = guided_velocity(guidance, C(to_float(nearer[0])), first_c, first_u);
    C mean_c = 0, mean_v = 0, squares_c = 0, squares_v = 0;
#pragma omp simd reduction(+ : mean_c, mean_v)
    for (int64_t j = 0; j < columns; ++j) {
      const C value = C(to_float(c[j]));
      mean_c += of_c[j] = value - first_c;
      mean_v += of_v[j] = guided_velocity(guidance, C(to_float(nearer[j])), value, C(to_float(u[j]))) - first_v;
    }
    mean_c /= C(columns), mean_v /= C(columns);
#pragma omp simd reduction(+ : squares_c, squares_v)
    for (int64_t j = 0; j < columns; ++j) {
      squares_c += (of_c[j] - mean_c) * (of_c[j] - mean_c);
      squares_v += (of_v[j] - mean_v) * (of_v[j] - mean_v);
    }
    const double n = double(columns);
    pairs[2 * r] = joined(pairs[2 * r], {n, double(first_c) + double(mean_c), double(squares_c)});
    pairs[2 * r + 1] = joined(pairs[2 * r + 1], {n, double(first_v) + double(mean_v), double(squares_v)});
  }
}

// target_clones does not reach through templates, hence a plain function a combination of types.
#define FMK_STEP(X, V, C, CLONES)                                                                             \
  CLONES void step(X* out, const RowCoefficients<C>& rows, const X* x, const V* c, const V* u, int64_t count, \
                   int64_t columns) {                                                                         \
    step_rows(out, rows, x, c, u, count, columns);                                                            \
  }
#define FMK_MEASURE(V, C, CLONES)                                                                           \
  CLONES void measure(Moments* pairs, const C* w, const V* c, const V* u, int64_t count, int64_t columns) { \
    measure_rows(pairs, w, c, u, count, columns);                                                           \
  }
FMK_STEP(float, float, float, FMK_CLONES)
FMK_STEP(float, bf16, float, FMK_CLONES)
FMK_STEP(float, f16, float, FMK_CLONES)
FMK_STEP(bf16, bf16, float, FMK_CLONES)
FMK_STEP(f16, f16, float, FMK_CLONES)
FMK_STEP(double, double, double, )
FMK_MEASURE(float, float, FMK_CLONES)
FMK_MEASURE(bf16, float, FMK_CLONES)
FMK_MEASURE(f16, float, FMK_CLONES)
FMK_MEASURE(double, double, )
#undef FMK_STEP
#undef FMK_MEASURE

// One number, or one of each row.
struct Coefficient {
  const void* rows;
  ScalarType type;
  int64_t stride;
  double value;

  double operator[](int64_t row) const {
    if (rows == nullptr) return value;
    if (type == ScalarType::Double) return static_cast<const double*>(rows)[row * stride];
    return static_cast<const float*>(rows)[row * stride];
  }
};

Coefficient coefficient(const std::optional<Tensor>& tensor, double value) {
  if (!tensor) return {nullptr, ScalarType::Double, 0, value};
  const ScalarType type = tensor->scalar_type();
  FMK_CHECK(type == ScalarType::Double || type == ScalarType::Float, "h and scale are float32 or float64");
  return {pointer(*tensor), type, tensor->dim() > 0, value};
}

struct GuidedEuler {
  int64_t rows, columns;
  ScalarType x_type, v_type;  // of x and x'; of both velocities
  const void *x, *c, *u;
  void* out;
  Coefficient h, w;
  double rescale;
};

// A tile as T: float and double are converted to where the memory holds another type.
template <class T>
const T* tile_as(const void* p, ScalarType type, int64_t offset, int64_t count, T* buffer) {
  if constexpr (std::is_floating_point_v<T>) return staged(p, type, offset, count, buffer);
  return static_cast<const T*>(p) + offset;
}

template <class V, class C>
void measure_task(const GuidedEuler& p, const Block& task, Moments* pairs) {
  alignas(64) V conditional[TILE], unconditional[TILE];
  C w[MAX_ROWS];
  for_tiles(task, [&](const Block& tile) {
    const int64_t offset = tile.row * p.columns + tile.column, elements = tile.rows * tile.count;
    for (int64_t r = 0; r < tile.rows; ++r) w[r] = C(p.w[tile.row + r]);
    const V* c = tile_as(p.c, p.v_type, offset, elements, conditional);
    const V* u = tile_as(p.u, p.v_type, offset, elements, unconditional);
    measure(pairs + 2 * (tile.row - task.row), w, c, u, tile.rows, tile.count);
  });
}

// The factors of a task's rows; `parts` holds a pair of moments a task where rows are longer than one.
template <class V, class C>
void rescale_factors(const GuidedEuler& p, const Cut& cut, const Block& task, const std::vector<Moments>& parts,
                     std::vector<Moments>& pairs, std::vector<double>& factors) {
  pairs.assign(2 * task.rows, Moments{});
  factors.resize(task.rows);
  if (parts.empty()) measure_task<V, C>(p, task, pairs.data());
  for (int64_t i = 0; i < (parts.empty() ? 0 : cut.spans); ++i) {
    for (int64_t k = 0; k < 2; ++k) pairs[k] = joined(pairs[k], parts[2 * (task.row * cut.spans + i) + k]);
  }
  for (int64_t r = 0; r < task.rows; ++r) factors[r] = rescale_factor(p.rescale, pairs[2 * r], pairs[2 * r + 1]);
}

template <class X, class V, class C>
void run(const GuidedEuler& p) {
  const Cut cut(p.rows, p.columns, TASK);
  std::vector<Moments> parts;
  if (p.rescale != 0 && cut.spans > 1) {
    parts.resize(2 * cut.blocks());
    parallel_for(0, cut.blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) measure_task<V, C>(p, cut.block(i), parts.data() + 2 * i);
    });
  }
  const bool direct = p.x_type == scalar_type_of<X>;
  parallel_for(0, cut.blocks(), 1, [&](int64_t begin, int64_t end) {
    alignas(64) X state[TILE], stepped[TILE];
    alignas(64) V conditional[TILE], unconditional[TILE];
    RowCoefficients<C> rows;
    std::vector<Moments> pairs;
    std::vector<double> factors;
    for (int64_t i = begin; i < end; ++i) {
      const Block task = cut.block(i);
      if (p.rescale != 0) rescale_factors<V, C>(p, cut, task, parts, pairs, factors);
      for_tiles(task, [&](const Block& tile) {
        const int64_t offset = tile.row * p.columns + tile.column, elements = tile.rows * tile.count;
        for (int64_t r = 0; r < tile.rows; ++r) {
          const int64_t row = tile.row + r;
          rows.h[r] = C(p.rescale != 0 ? p.h[row] * factors[row - task.row] : p.h[row]);
          rows.w[r] = C(p.w[row]);
        }
        const X* x = tile_as(p.x, p.x_type, offset, elements, state);
        const V* c = tile_as(p.c, p.v_type, offset, elements, conditional);
        const V* u = tile_as(p.u, p.v_type, offset, elements, unconditional);
        step(direct ? static_cast<X*>(p.out) + offset : stepped, rows, x, c, u, tile.rows, tile.count);
        if constexpr (std::is_floating_point_v<X>) {
          if (!direct) store(p.out, p.x_type, offset, stepped, elements);
        }
      });
    }
  });
}

Tensor guided_euler(const Tensor& x_in, const Tensor& conditional_in, const Tensor& unconditional_in,
                    const std::optional<Tensor>& h_in, const std::optional<Tensor>& scale_in, double h_value,
                    double scale_value, double rescale) {
  const Tensor x = as_contiguous(x_in), c = as_contiguous(conditional_in), u = as_contiguous(unconditional_in);
  const auto h = as_contiguous(h_in), scale = as_contiguous(scale_in);
  FMK_CHECK(c.scalar_type() == u.scalar_type(), "conditional and unconditional differ in dtype");
  Tensor out = empty_as(x);
  const int64_t elements = x.numel();
  if (elements == 0) return out;
  // Numbers alike for every row and nothing summed by row: one long row.
  const bool by_row = rescale != 0 || (h && h->dim() > 0) || (scale && scale->dim() > 0);
  const int64_t rows = by_row && x.dim() > 0 ? x.size(0) : 1;
  const GuidedEuler step{
      rows,       elements / rows, x.scalar_type(),        c.scalar_type(),         pointer(x),
      pointer(c), pointer(u),      out.mutable_data_ptr(), coefficient(h, h_value), coefficient(scale, scale_value),
      rescale,
  };
  const auto types = [&](ScalarType x_type, ScalarType v_type) {
    return step.x_type == x_type && step.v_type == v_type;
  };
  if (step.x_type == ScalarType::Double || step.v_type == ScalarType::Double) {
    run<double, double, double>(step);
  } else if (types(ScalarType::Float, ScalarType::BFloat16)) {
    run<float, bf16, float>(step);
  } else if (types(ScalarType::Float, ScalarType::Half)) {
    run<float, f16, float>(step);
  } else if (types(ScalarType::BFloat16, ScalarType::BFloat16)) {
    run<bf16, bf16, float>(step);
  } else if (types(ScalarType::Half, ScalarType::Half)) {
    run<f16, f16, float>(step);
  } else {  // other pairs by way of float
    run<float, float, float>(step);
  }
  return out;
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("guided_euler", TORCH_BOX(&fmk::guided_euler)); }
