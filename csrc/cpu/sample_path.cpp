// sample_path: draw t and noise, form x_t and the row table, in one pass.
#include "torch/path.h"

#include "noise.h"
#include "stage.h"

namespace fmk {
namespace {

constexpr int64_t MAX_ROWS = TILE / 4;  // of a tile: a row takes at least one group

// The path's coefficients of a tile's rows.
template <class C>
struct RowCoefficients {
  alignas(64) C alpha[MAX_ROWS], sigma[MAX_ROWS], gamma[MAX_ROWS];
};

// x_t = α x1 + σ x0 (+ γ z)
template <class C>
FMK_INLINE void combine_rows(C* __restrict out, const RowCoefficients<C>& rows, const C* __restrict x1,
                             const C* __restrict x0, const C* __restrict z, int64_t count, int64_t columns) {
  with_columns(count, columns, [&]<int D>() __attribute__((always_inline)) {
    const int64_t n = D ? D : columns;
    for (int64_t r = 0; r < count; ++r) {
      const C alpha = rows.alpha[r], sigma = rows.sigma[r], gamma = rows.gamma[r];
      if (z) {
        for (int64_t j = r * n; j < r * n + n; ++j) out[j] = alpha * x1[j] + sigma * x0[j] + gamma * z[j];
      } else {
        for (int64_t j = r * n; j < r * n + n; ++j) out[j] = alpha * x1[j] + sigma * x0[j];
      }
    }
  });
}

// target_clones does not reach through templates, hence a plain function a type.
FMK_CLONES void combine(float* out, const RowCoefficients<float>& rows, const float* x1, const float* x0,
                        const float* z, int64_t count, int64_t columns) {
  combine_rows(out, rows, x1, x0, z, count, columns);
}
void combine(double* out, const RowCoefficients<double>& rows, const double* x1, const double* x0, const double* z,
             int64_t count, int64_t columns) {
  combine_rows(out, rows, x1, x0, z, count, columns);
}

template <class T, class C>
FMK_INLINE void evaluate_rows(const PathDescription& d, RowCoefficients<C>& rows, const T* t, const T* coefficients,
                              T* t_out, T* table, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    // Not one struct for all: copying it stalls on stores that are not done yet, 20 ns a row.
    const Coefficients<T> v = path_coefficients(d, r, t[r], coefficients);
    const Row<T> loss = path_objective(d, t[r], v);
    rows.alpha[r] = C(v.alpha * loss.scale), rows.sigma[r] = C(v.sigma * loss.scale);
    rows.gamma[r] = C(v.gamma * loss.scale);
    if (table) {
      t_out[r] = t[r];
      write_table(table, r, loss);
    }
  }
}

// The path's coefficients of a tile's rows; t and the table are written where they are not null.
template <class T, class C>
FMK_INLINE void evaluate_any(const PathDescription& d, RowCoefficients<C>& rows, const T* t, const T* coefficients,
                             T* t_out, T* table, int64_t count) {
  if (d.schedule == SCHEDULE_COND_OT && d.prediction == PREDICT_VELOCITY && d.weight == WEIGHT_NONE) {
    // The commonest description as constants: short rows would pay more for the switches than for their elements.
    PathDescription constant = d;
    constant.schedule = SCHEDULE_COND_OT, constant.prediction = PREDICT_VELOCITY, constant.weight = WEIGHT_NONE;
    return evaluate_rows<T, C>(constant, rows, t, nullptr, t_out, table, count);
  }
  evaluate_rows(d, rows, t, coefficients, t_out, table, count);
}
FMK_CLONES void evaluate(const PathDescription& d, RowCoefficients<float>& rows, const float* t, const float* given,
                         float* t_out, float* table, int64_t count) {
  evaluate_any(d, rows, t, given, t_out, table, count);
}
template <class C>
void evaluate(const PathDescription& d, RowCoefficients<C>& rows, const double* t, const double* given, double* t_out,
              double* table, int64_t count) {
  evaluate_any(d, rows, t, given, t_out, table, count);
}

struct Path {
  PathDescription description;
  uint64_t seed;
  int64_t rows, columns, first_row, strata;
  ScalarType type;  // of x1, x0, z and x_t
  const void *x1, *x0;
  void *x_t, *stored_x0, *stored_z;
  bool bridge;
};

// T: times and coefficients. C: arithmetic of the elements.
template <class T, class C>
void run(const Path& p, const T* t, const T* coefficients, T* t_out, T* table) {
  const Cut cut(p.rows, p.columns, TASK);
  const bool direct = p.type == scalar_type_of<C>;
  parallel_for(0, cut.blocks(), 1, [&](int64_t begin, int64_t end) {
    alignas(64) C noise[TILE], bridge[TILE], data[TILE], given[TILE], mixed[TILE];
    double words[MAX_ROWS];
    T times[MAX_ROWS];
    RowCoefficients<C> rows;
    for (int64_t i = begin; i < end; ++i) {
      const Block task = cut.block(i);
      for_tiles(task, [&](const Block& tile) {
        if (task.rows > 1 || tile.column == task.column) {  // once for the tiles of a long row
          if (!t) time_uniforms(words, p.seed, p.first_row, tile.row, tile.rows);
          for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t index = tile.row + r;
            times[r] = t ? t[index] : drawn_time<T>(p.description, p.seed, p.first_row + index, p.strata, words[r]);
          }
          T* own_t = tile.first() ? t_out + tile.row : nullptr;
          T* own_table = tile.first() ? table + TABLE_COLUMNS * tile.row : nullptr;
          evaluate(p.description, rows, times, coefficients ? coefficients + 6 * tile.row : nullptr, own_t, own_table,
                   tile.rows);
        }
        const int64_t offset = tile.row * p.columns + tile.column, elements = tile.rows * tile.count;
        if (elements == 0) return;
        const C* x1 = staged<C>(p.x1, p.type, offset, elements, data);
        const C* x0 = staged<C>(p.x0, p.type, offset, elements, given);
        if (!x0) {
          C* drawn = direct && p.stored_x0 && tile.rows == 1 && tile.count % 4 == 0
                         ? static_cast<C*>(p.stored_x0) + offset
                         : noise;
          normals(drawn, p.seed, p.first_row, tile, stream_word(STREAM_X0, 0), p.type);
          if (p.stored_x0 && drawn == noise) store(p.stored_x0, p.type, offset, noise, elements);
          x0 = drawn;
        }
        if (p.bridge) {
          normals(bridge, p.seed, p.first_row, tile, stream_word(STREAM_BRIDGE, 0), p.type);
          if (p.stored_z) store(p.stored_z, p.type, offset, bridge, elements);
        }
        C* out = direct ? static_cast<C*>(p.x_t) + offset : mixed;
        combine(out, rows, x1, x0, p.bridge ? bridge : nullptr, tile.rows, tile.count);
        if (!direct) store(p.x_t, p.type, offset, mixed, elements);
      });
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_path(
    const Tensor& x1_in, const std::optional<Tensor>& x0_in, const std::optional<Tensor>& t_in,
    const std::optional<Tensor>& coefficients_in, const Tensor& key, int64_t first_row, int64_t strata, int64_t t_dims,
    int64_t schedule, double s0, double s1, double t_low, double t_high, bool bridge, int64_t sampler, double q0,
    double q1, double shift, int64_t prediction, int64_t compare, double o0, int64_t weight, double weight_k,
    int64_t store) {
  const Tensor x1 = as_contiguous(x1_in);
  const auto x0 = as_contiguous(x0_in), t = as_contiguous(t_in), coefficients = as_contiguous(coefficients_in);
  const ScalarType type = x1.scalar_type();
  const bool wide = type == ScalarType::Double || (t && t->scalar_type() == ScalarType::Double);
  const ScalarType time_type = wide ? ScalarType::Double : ScalarType::Float;
  FMK_CHECK(!x0 || x0->scalar_type() == type, "x0 and x1 differ in dtype");

  const Sizes sizes = x1.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.begin() + t_dims);
  int64_t rows = 1;
  for (const int64_t size : shape) rows *= size;
  const int64_t columns = rows > 0 ? x1.numel() / rows : 0;

  Tensor t_out = empty_as(x1, Sizes(shape.data(), shape.size()), time_type);
  shape.push_back(TABLE_COLUMNS);
  Tensor table = empty_as(x1, Sizes(shape.data(), shape.size()), time_type);
  Tensor x_t = empty_as(x1);
  const int64_t none[] = {0};
  Tensor stored_x0 = store & STORE_X0 ? empty_as(x1) : empty_as(x1, Sizes(none, 1));
  Tensor stored_z = store & STORE_Z ? empty_as(x1) : empty_as(x1, Sizes(none, 1));

  const Path path{
      {int(schedule), s0, s1, t_low, t_high, int(sampler), q0, q1, shift, int(prediction), int(compare), o0,
       int(weight), weight_k},
      uint64_t(*data<const int64_t>(key)),
      rows,
      columns,
      first_row,
      strata,
      type,
      pointer(x1),
      pointer(x0),
      x_t.mutable_data_ptr(),
      store & STORE_X0 ? stored_x0.mutable_data_ptr() : nullptr,
      store & STORE_Z ? stored_z.mutable_data_ptr() : nullptr,
      bridge,
  };
  const auto launch = [&]<class T, class C>() {
    // Times given in float32 beside float64 data are widened here.
    std::vector<T> wide_t;
    const T* times = nullptr;
    if (t && t->scalar_type() != scalar_type_of<T>) {
      wide_t.resize(rows);
      load(wide_t.data(), pointer(t), t->scalar_type(), 0, rows);
      times = wide_t.data();
    } else if (t) {
      times = data<const T>(*t);
    }
    run<T, C>(path, times, data<const T>(coefficients), data<T>(t_out), data<T>(table));
  };
  if (type == ScalarType::Double) {
    launch.operator()<double, double>();
  } else if (wide) {
    launch.operator()<double, float>();
  } else {
    launch.operator()<float, float>();
  }
  return {x_t, t_out, table, stored_x0, stored_z};
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("sample_path", TORCH_BOX(&fmk::sample_path)); }
