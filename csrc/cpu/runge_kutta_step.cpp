// _runge_kutta_step_: solution, error, norm, decision, commit and dense output at the end of an adaptive step.
//
// Short rows go through in tiles whose solution stays in a buffer until it is committed. Rows longer than a tile take
// two passes, sums of squares a tile and then the commit, which forms the solution again: while the row is still in the
// cache, or, where it is longer than a task, on all threads, last tile first.
#include "runge_kutta.h"

#include "error_norm.h"
#include "math/step_control.h"

namespace fmk {
namespace {

constexpr int64_t MAX_ROWS = TILE / 4;  // of a tile

// x ← start + h x and e ← h e, a step size a row.
template <class C>
FMK_INLINE void scale_rows(C* x, C* e, const C* start, const C* h, int64_t rows, int64_t columns) {
  with_columns(rows, columns, [&]<int D>() __attribute__((always_inline)) {
    for_elements<D>(rows, columns, [&](int64_t r, int64_t j) __attribute__((always_inline)) {
      x[j] = start[j] + h[r] * x[j];
      e[j] *= h[r];
    });
  });
}

// y ← y₁ in the rows that were accepted.
template <class C>
FMK_INLINE void select_rows(C* y, const C* y1, const int32_t* accepted, int64_t rows, int64_t columns) {
  with_columns(rows, columns, [&]<int D>() __attribute__((always_inline)) {
    for_elements<D>(rows, columns, [&](int64_t r, int64_t j) __attribute__((always_inline)) {
      const Bits<C> m = accepted[r];  // all bits or none
      y[j] = bit_cast<C>((bit_cast<Bits<C>>(y1[j]) & m) | (bit_cast<Bits<C>>(y[j]) & ~m));
    });
  });
}

template <int POWERS>
FMK_INLINE void decide_rows(const StepSettings& settings, double* control, int32_t* counters, int64_t stride,
                            const double* ratio, const int32_t* finite, int32_t* accepted, int64_t rows) {
  const StepSettings s = settings;
  const auto row = [&](auto* table, int i) { return table + i * stride; };
  double *t = row(control, CONTROL_T), *t_next = row(control, CONTROL_T_NEXT), *end = row(control, CONTROL_END),
         *error = row(control, CONTROL_ERROR), *older = row(control, CONTROL_OLDER_ERROR),
         *previous = row(control, CONTROL_T_PREVIOUS), *last = row(control, CONTROL_RATIO);
  int32_t *status = row(counters, COUNTER_STATUS), *taken = row(counters, COUNTER_ACCEPTED),
          *refused = row(counters, COUNTER_REJECTED), *after_rejection = row(counters, COUNTER_AFTER_REJECTION);
  // Integers as wide as the numbers, or the loop would not vectorise.
  alignas(64) int64_t state[MAX_ROWS], steps[MAX_ROWS], after[MAX_ROWS], solved[MAX_ROWS];
  alignas(64) Mask running[MAX_ROWS], yes[MAX_ROWS];
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) {
    state[r] = status[r], steps[r] = taken[r] + refused[r], after[r] = after_rejection[r], solved[r] = finite[r];
  }
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) {
    const StepDecision d = decide<POWERS>(s, t[r], t_next[r], end[r], error[r], older[r], previous[r], last[r],
                                          ratio[r], solved[r], state[r], steps[r], after[r]);
    t[r] = d.t, t_next[r] = d.t_next, error[r] = d.error, older[r] = d.older_error, previous[r] = d.t_previous;
    last[r] = d.ratio, state[r] = d.status, running[r] = d.running, yes[r] = d.accepted;
  }
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t ran = int32_t(running[r]), good = int32_t(yes[r]), bad = ran & ~good;  // -1 or 0
    status[r] = int32_t(state[r]), accepted[r] = good;
    taken[r] -= good, refused[r] -= bad;
    after_rejection[r] = (bad & 1) | (after_rejection[r] & ~ran);
  }
}

FMK_CLONES void decisions(const StepSettings& s, double* control, int32_t* counters, int64_t stride,
                          const double* ratio, const int32_t* finite, int32_t* accepted, int64_t rows) {
  if (s.beta2 != 0 || s.beta3 != 0) {
    decide_rows<2>(s, control, counters, stride, ratio, finite, accepted, rows);
  } else if (s.beta1 != 0) {
    decide_rows<1>(s, control, counters, stride, ratio, finite, accepted, rows);
  } else {
    decide_rows<0>(s, control, counters, stride, ratio, finite, accepted, rows);
  }
}

// target_clones does not reach through templates, hence plain functions a type.
#define FMK_LOOPS(C)                                                                                                  \
  FMK_CLONES void differences(C* h, const double* t, const double* t_next, int64_t rows) {                            \
    for (int64_t r = 0; r < rows; ++r) h[r] = C(t_next[r] - t[r]);                                                    \
  }                                                                                                                   \
  FMK_CLONES void scale(C* x, C* e, const C* start, const C* h, int64_t rows, int64_t columns) {                      \
    scale_rows(x, e, start, h, rows, columns);                                                                        \
  }                                                                                                                   \
  FMK_CLONES void scaled_norms(double* ratio, int32_t* finite, C* squares, Bits<C>* largest, C* y1, C* e, const C* y, \
                               const C* h, const C* rtol, const C* atol, int64_t rows, int64_t columns) {             \
    norm_rows(squares, largest, y1, e, y, h, rtol, atol, rows, columns);                                              \
    finish_rows(ratio, finite, squares, largest, C(columns), rows);                                                   \
  }                                                                                                                   \
  FMK_CLONES void norm(C& squares, Bits<C>& largest, C* y1, const C* start, const C* start2, const C* y,              \
                       const C* const* k, const C* a, const C* b, C rtol, C atol, int64_t terms, int64_t count) {     \
    norm_row<false>(squares, largest, y1, start, start2, y, k, a, b, rtol, atol, terms, count);                       \
  }                                                                                                                   \
  FMK_CLONES Bits<C> magnitude(const C* y1, int64_t count) { return magnitude_of(y1, count); }                        \
  FMK_CLONES void squares(C* e, const C* y, const C* y1, const double* rtol, const double* atol, int64_t rtol_step,   \
                          int64_t atol_step, int64_t components, int64_t count) {                                     \
    square_row(e, y, y1, rtol, atol, rtol_step, atol_step, components, count);                                        \
  }                                                                                                                   \
  FMK_CLONES C total(const C* x, int64_t count) { return sum_of(x, count); }                                          \
  FMK_CLONES void select(C* y, const C* y1, const int32_t* accepted, int64_t rows, int64_t columns) {                 \
    select_rows(y, y1, accepted, rows, columns);                                                                      \
  }
FMK_LOOPS(float)
FMK_LOOPS(double)
#undef FMK_LOOPS

#define FMK_NORM(T)                                                                                                \
  FMK_CLONES void norm(float& squares, int32_t& largest, float* y1, const T* y, const T* const* k, const float* a, \
                       const float* b, float rtol, float atol, int64_t terms, int64_t count) {                     \
    norm_row<true, float, T>(squares, largest, y1, nullptr, nullptr, y, k, a, b, rtol, atol, terms, count);        \
  }
FMK_NORM(bf16)
FMK_NORM(f16)
#undef FMK_NORM

// A [1 or B, 1 or D] tensor.
struct Tolerance {
  const double* values;
  int64_t row_step, column_step;
  const double* at(int64_t row, int64_t column) const { return values + row * row_step + column * column_step; }
};

struct Step {
  Terms k;  // k_1 is k_first
  void *y, *k_first;
  int64_t rows, columns;
  double* control;
  int32_t* counters;
  StepSettings settings;
  const double* weights;  // b, e, P_1, ...
  int64_t degree;
  Tolerance rtol, atol;
  const int64_t* segments;
  int64_t parts, components;
  bool narrow, simple_norm;  // see NARROW; a segment of all columns, real, with a tolerance for each row at most
  const double *ratios = nullptr, *t_eval = nullptr;
  int64_t ratio_step = 0, times = 0, t_eval_step = 0;
  void* solution = nullptr;

  double h(int64_t row) const { return control[rows + row] - control[row]; }
  const double* row_weights(int64_t i) const { return weights + i * k.count; }
  bool running(int64_t row) const { return counters[row] == STATUS_RUNNING; }
};

// Storage and arithmetic of one thread.
template <class C>
struct Work {
  alignas(64) C y1[TILE], e[TILE], state[TILE], out[TILE];
  alignas(64) C h[MAX_ROWS], rtol[MAX_ROWS], atol[MAX_ROWS], squares[MAX_ROWS];
  alignas(64) Bits<C> largest[MAX_ROWS];
  C b[MAX_TERMS], error[MAX_TERMS];
  alignas(64) double ratio[MAX_ROWS];
  alignas(64) int32_t finite[MAX_ROWS], accepted[MAX_ROWS];
};

template <class C>
const C* state_of(const Step& s, Work<C>& w, int64_t offset, int64_t count) {
  return staged<C>(s.y, s.k.type, offset, count, w.state);
}

template <class C>
void row_weights(C* out, const Step& s, int64_t i, double h) {
  const double* weights = s.row_weights(i);
  for (int64_t j = 0; j < s.k.count; ++j) out[j] = C(h * weights[j]);
}

// Σ (e / tolerance)² over each segment, of columns [column, column + count) of a row, y₁ and e being there already;
// returns whether y₁ is finite.
template <class C>
bool sum_segments(const Step& s, Work<C>& w, double* sums, int64_t row, const C* y, int64_t at, int64_t column,
                  int64_t count) {
  std::fill_n(sums, s.parts, 0.0);
  const bool finite = magnitude(w.y1 + at, count) < INFINITE_BITS<C>;
  if (s.ratios) return finite;
  const int64_t first = column / s.components, numbers = count / s.components;
  squares(w.e + at, y + at, w.y1 + at, s.rtol.at(row, first), s.atol.at(row, first), s.rtol.column_step,
          s.atol.column_step, s.components, numbers);
  for (int64_t i = 0; i < s.parts; ++i) {
    const int64_t low = std::max(s.segments[2 * i] - first, int64_t(0));
    const int64_t high = std::min(s.segments[2 * i + 1] - first, numbers);
    if (low < high) sums[i] = double(total(w.e + at + low, high - low));
  }
  return finite;
}

// The same with y₁ of that part of the row, into w.y1.
template <class C>
bool solve(const Step& s, Work<C>& w, double* sums, int64_t row, const C* y, int64_t at, int64_t column,
           int64_t count) {
  const int64_t offset = row * s.columns + column;
  const double h = s.h(row);
  row_weights(w.b, s, 0, h);
  if (!s.ratios) row_weights(w.error, s, 1, h);
  C *y1 = w.y1 + at, *e = s.ratios ? nullptr : w.e + at;
  if (!s.simple_norm) {
    weighted_sums<C>(y1, e, y + at, w.b, w.error, s.k, offset, count);
    return sum_segments(s, w, sums, row, y, at, column, count);
  }
  const C rtol = C(*s.rtol.at(row, 0)), atol = C(*s.atol.at(row, 0)), *from = y + at, *from2 = ZEROS<C>;
  if constexpr (std::is_same_v<C, float>) {
    if (s.k.in_half()) {
      with_half(s.k, s.y, offset, [&]<class T>(const T* y, const T* const* k) {
        norm(w.squares[0], w.largest[0], y1, y, k, w.b, w.error, rtol, atol, s.k.count, count);
      });
      sums[0] = double(w.squares[0]);
      return w.largest[0] < INFINITE_BITS<C>;
    }
  }
  for_groups<C>(s.k, offset, count, [&](const C* const* k, int64_t done, int64_t group) {
    if (done + group < s.k.count) {
      add_terms(y1, e, from, from2, k, w.b + done, w.error + done, group, count);
    } else {
      norm(w.squares[0], w.largest[0], y1, from, from2, y + at, k, w.b + done, w.error + done, rtol, atol, group,
           count);
    }
    from = y1, from2 = e;
  });
  sums[0] = double(w.squares[0]);
  return w.largest[0] < INFINITE_BITS<C>;
}

// The largest RMS of the segments, in the precision of C, as the reference has it.
template <class C>
double ratio_of(const Step& s, const double* sums) {
  double largest = 0;
  for (int64_t i = 0; i < s.parts; ++i) {
    const double ratio = double(std::sqrt(C(sums[i]) / C(s.segments[2 * i + 1] - s.segments[2 * i])));
    largest = ratio > largest || ratio != ratio ? ratio : largest;
    if (ratio != ratio) break;
  }
  return largest;
}

// Writes the solution at the times in (t, t_next] for a part of an accepted row; returns how many there are.
template <class C>
int64_t dense_output(const Step& s, Work<C>& w, int64_t row, const C* y, const C* y1, int64_t at, int64_t offset,
                     int64_t column, int64_t count) {
  const auto control = [&](int64_t i) { return s.control[i * s.rows + row]; };
  const double t = control(CONTROL_T_PREVIOUS), t_next = control(CONTROL_T), end = control(CONTROL_END), h = t_next - t;
  const double direction = end > t ? 1.0 : end < t ? -1.0 : 0.0;
  const double* times = s.t_eval + row * s.t_eval_step;
  const bool direct = s.k.type == scalar_type_of<C>;
  int64_t due = 0;
  for (int64_t m = s.counters[COUNTER_CURSOR * s.rows + row]; m < s.times; ++m) {
    const double ahead = (times[m] - t_next) * direction;
    if (ahead > 0) break;
    if (!(ahead <= 0)) continue;  // NaN is never due
    ++due;
    const int64_t target = (row * s.times + m) * s.columns + column;
    const double theta = (times[m] - t) / h;
    if (theta == 1) {
      store(s.solution, s.k.type, target, y1 + at, count);
      continue;
    }
    for (int64_t j = 0; j < s.k.count; ++j) {
      double polynomial = 0;
      for (int64_t p = s.degree; p > 0; --p) polynomial = (polynomial + s.row_weights(1 + p)[j]) * theta;
      w.error[j] = C(h * polynomial);
    }
    C* out = direct ? static_cast<C*>(s.solution) + target : w.out;
    if (direct && count < NARROW) {  // calls and loops over tiles take longer than these few numbers
      for (int64_t c = 0; c < count; ++c) {
        C x = y[at + c];
        for (int64_t j = 0; j < s.k.count; ++j) x += w.error[j] * static_cast<const C*>(s.k.k[j])[offset + at + c];
        out[c] = x;
      }
      continue;
    }
    weighted_sums<C>(out, nullptr, y + at, w.error, nullptr, s.k, offset + at, count);
    if (!direct) store(s.solution, s.k.type, target, w.out, count);
  }
  return due;
}

// Overwrites a part of k_first by the last k.
void keep_last(const Step& s, int64_t offset, int64_t count) {
  const int64_t size = s.k.type == ScalarType::Double ? 8 : s.k.type == ScalarType::Float ? 4 : 2;
  std::memcpy(static_cast<char*>(s.k_first) + offset * size,
              static_cast<const char*>(s.k.k[s.k.count - 1]) + offset * size, size_t(count * size));
}

// Overwrites a part of an accepted row by the solution and k_first by the last k.
template <class C>
void commit(const Step& s, const C* y1, int64_t offset, int64_t count) {
  store(s.y, s.k.type, offset, y1, count);
  keep_last(s, offset, count);
}

// Decides rows [row, row + count) from w.ratio and w.finite, into w.accepted.
template <class C>
void decide(const Step& s, Work<C>& w, int64_t row, int64_t count) {
  for (int64_t r = 0; s.ratios && r < count; ++r) w.ratio[r] = s.ratios[(row + r) * s.ratio_step];
  decisions(s.settings, s.control + row, s.counters + row, s.rows, w.ratio, w.finite, w.accepted, count);
}

// A tile of whole rows.
template <class C>
void step_tile(const Step& s, Work<C>& w, const Block& tile) {
  const int64_t columns = s.columns, offset = tile.row * columns, elements = tile.rows * columns;
  const bool together = s.narrow, direct = s.k.type == scalar_type_of<C>;
  bool any = false;
  for (int64_t r = 0; r < tile.rows && !any; ++r) any = s.running(tile.row + r);
  if (!any) return;
  const C* y = state_of(s, w, offset, elements);

  if (together) {
    row_weights(w.b, s, 0, 1), row_weights(w.error, s, 1, 1);
    weighted_sums<C>(w.y1, w.e, ZEROS<C>, w.b, w.error, s.k, offset, elements);
    differences(w.h, s.control + tile.row, s.control + s.rows + tile.row, tile.rows);
  }
  if (together && s.simple_norm) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      w.rtol[r] = C(*s.rtol.at(tile.row + r, 0)), w.atol[r] = C(*s.atol.at(tile.row + r, 0));
    }
    scaled_norms(w.ratio, w.finite, w.squares, w.largest, w.y1, w.e, y, w.h, w.rtol, w.atol, tile.rows, columns);
  } else {
    if (together) scale(w.y1, w.e, y, w.h, tile.rows, columns);
    std::vector<double> parts(s.parts > 1 ? s.parts : 0);
    double one, *sums = s.parts > 1 ? parts.data() : &one;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r, at = r * columns;
      w.finite[r] = 0, w.ratio[r] = 0;
      if (!s.running(row)) continue;
      w.finite[r] =
          together ? sum_segments(s, w, sums, row, y, at, 0, columns) : solve(s, w, sums, row, y, at, 0, columns);
      w.ratio[r] = ratio_of<C>(s, sums);
    }
  }
  decide(s, w, tile.row, tile.rows);

  if (s.t_eval) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = tile.row + r, at = r * columns;
      if (!w.accepted[r]) continue;
      s.counters[COUNTER_CURSOR * s.rows + row] += int32_t(dense_output(s, w, row, y, w.y1, at, offset, 0, columns));
    }
  }
  if (together && direct) {
    select(static_cast<C*>(s.y) + offset, w.y1, w.accepted, tile.rows, columns);
    select(static_cast<C*>(s.k_first) + offset, static_cast<const C*>(s.k.k[s.k.count - 1]) + offset, w.accepted,
           tile.rows, columns);
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    if (w.accepted[r]) commit(s, w.y1 + r * columns, offset + r * columns, columns);
  }
}

// Sums of squares of a tile of a long row, one a segment, and after them whether its solution is finite.
template <class C>
void measure(const Step& s, Work<C>& w, double* sums, int64_t row, int64_t column, int64_t count) {
  const bool staged = !(s.simple_norm && s.k.in_half());
  const C* y = staged ? state_of(s, w, row * s.columns + column, count) : w.state;
  sums[s.parts] = solve(s, w, sums, row, y, 0, column, count);
}

// The decision on a long row; sums: those of its tiles, one after the other.
template <class C>
bool finish(const Step& s, Work<C>& w, const double* sums, int64_t row, int64_t tiles) {
  std::vector<double> parts(s.parts);
  bool finite = true;
  for (int64_t i = 0; i < tiles; ++i, sums += s.parts + 1) {
    for (int64_t p = 0; p < s.parts; ++p) parts[p] += sums[p];
    finite = finite && sums[s.parts] != 0;
  }
  w.ratio[0] = ratio_of<C>(s, parts.data());
  w.finite[0] = finite;
  decide(s, w, row, 1);
  return w.accepted[0];
}

// Forms the solution of a tile of an accepted long row again and commits it; returns how many output times were due.
template <class C>
int64_t recommit(const Step& s, Work<C>& w, int64_t row, int64_t column, int64_t count) {
  const int64_t offset = row * s.columns + column;
  row_weights(w.b, s, 0, s.control[row] - s.control[CONTROL_T_PREVIOUS * s.rows + row]);
  if constexpr (std::is_same_v<C, float>) {
    if (!s.t_eval && s.k.in_half()) {
      add_in_half(s.y, s.y, w.b, s.k, offset, count);
      keep_last(s, offset, count);
      return 0;
    }
  }
  const C* y = state_of(s, w, offset, count);
  weighted_sums<C>(w.y1, nullptr, y, w.b, nullptr, s.k, offset, count);
  const int64_t due = s.t_eval ? dense_output(s, w, row, y, w.y1, 0, offset, column, count) : 0;
  commit(s, w.y1, offset, count);
  return due;
}

template <class C>
void run(const Step& s) {
  if (s.columns <= TILE) {
    const Cut cut(s.rows, s.columns, TASK);
    parallel_for(0, cut.blocks(), 1, [&](int64_t begin, int64_t end) {
      Work<C> w;
      for (int64_t i = begin; i < end; ++i) {
        for_tiles(cut.block(i), [&](const Block& tile) { step_tile(s, w, tile); });
      }
    });
    return;
  }
  const int64_t tiles = (s.columns + TILE - 1) / TILE, stride = s.parts + 1;
  const auto count_of = [&](int64_t tile) { return std::min(TILE, s.columns - tile * TILE); };
  int32_t* cursor = s.counters + COUNTER_CURSOR * s.rows;
  if (s.columns <= TASK) {
    parallel_for(0, s.rows, TASK / s.columns, [&](int64_t begin, int64_t end) {
      Work<C> w;
      std::vector<double> sums(tiles * stride);
      for (int64_t row = begin; row < end; ++row) {
        if (!s.running(row)) continue;
        for (int64_t i = 0; i < tiles; ++i) measure(s, w, sums.data() + i * stride, row, i * TILE, count_of(i));
        if (!finish(s, w, sums.data(), row, tiles)) continue;
        int64_t due = 0;
        for (int64_t i = tiles; i-- > 0;) due = recommit(s, w, row, i * TILE, count_of(i));
        cursor[row] += int32_t(due);
      }
    });
    return;
  }
  std::vector<double> sums(s.rows * tiles * stride);
  parallel_for(0, s.rows * tiles, TASK / TILE, [&](int64_t begin, int64_t end) {
    Work<C> w;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tiles, tile = i % tiles;
      if (s.running(row)) measure(s, w, sums.data() + i * stride, row, tile * TILE, count_of(tile));
    }
  });
  std::vector<int32_t> accepted(s.rows), due(s.rows);
  Work<C> control;
  for (int64_t row = 0; row < s.rows; ++row) {
    accepted[row] = s.running(row) && finish(s, control, sums.data() + row * tiles * stride, row, tiles);
  }
  parallel_for(0, s.rows * tiles, TASK / TILE, [&](int64_t begin, int64_t end) {
    Work<C> w;
    for (int64_t i = end; i-- > begin;) {
      const int64_t row = i / tiles, tile = i % tiles;
      if (!accepted[row]) continue;
      const int64_t times = recommit(s, w, row, tile * TILE, count_of(tile));
      if (tile == 0) due[row] = int32_t(times);
    }
  });
  for (int64_t row = 0; row < s.rows; ++row) cursor[row] += due[row];
}

template <class T>
T* overwritten(const char* name, const Tensor& tensor, ScalarType type, int64_t elements) {
  FMK_CHECK(tensor.is_contiguous() && tensor.scalar_type() == type && tensor.numel() == elements, name,
            ": expected contiguous, of ", elements, " elements of ", torch::headeronly::toString(type));
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tolerance tolerance(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, Contiguous& contiguous) {
  FMK_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.dim() == 2, name, ": expected float64 [., .]");
  const int64_t own_rows = tensor.size(0), own_columns = tensor.size(1);
  FMK_CHECK((own_rows == 1 || own_rows == rows) && (own_columns == 1 || own_columns == columns), name,
            ": expected [1 or ", rows, ", 1 or ", columns, "], got [", own_rows, ", ", own_columns, "]");
  return {static_cast<const double*>(contiguous(tensor)), own_rows > 1 ? own_columns : 0, own_columns > 1 ? 1 : 0};
}

void runge_kutta_step(const Tensor& y, const Tensor& k_first, const std::vector<Tensor>& k, const Tensor& control,
                      const Tensor& counters, const Tensor& weights, const Tensor& settings, const Tensor& rtol,
                      const Tensor& atol, const Tensor& segments, int64_t components,
                      const std::optional<Tensor>& ratio, const std::optional<Tensor>& t_eval,
                      const std::optional<Tensor>& solution) {
  Contiguous contiguous;
  Step s;
  s.k.type = y.scalar_type(), s.k.elements = y.numel();
  s.rows = control.dim() == 1 ? 1 : control.size(1);
  s.columns = s.rows > 0 ? s.k.elements / s.rows : 0;
  s.narrow = control.dim() > 1 && s.columns < NARROW;
  s.y = overwritten<void>("y", y, s.k.type, s.rows * s.columns);
  s.k_first = overwritten<void>("k_first", k_first, s.k.type, s.k.elements);
  s.control = overwritten<double>("control", control, ScalarType::Double, CONTROLS * s.rows);
  s.counters = overwritten<int32_t>("counters", counters, ScalarType::Int, COUNTERS * s.rows);
  FMK_CHECK(!k.empty(), "k: expected at least the value at the end of the step");
  s.k.add(k_first, contiguous);
  for (const Tensor& k_j : k) s.k.add(k_j, contiguous);

  s.components = components;
  s.weights = static_cast<const double*>(contiguous(weights));
  s.degree = weights.size(0) - 2;
  FMK_CHECK(weights.scalar_type() == ScalarType::Double && s.degree >= 0 && weights.size(1) == s.k.count,
            "weights: expected float64 [2 + degree, 1 + len(k)]");
  FMK_CHECK(settings.scalar_type() == ScalarType::Double && settings.numel() == SETTINGS, "settings: expected ",
            SETTINGS, " of float64");
  std::memcpy(&s.settings, contiguous(settings), sizeof(StepSettings));
  FMK_CHECK((components == 1 || components == 2) && s.columns % components == 0, "components: ", components, " of ",
            s.columns, " columns");
  const int64_t numbers = s.columns / components;
  s.rtol = tolerance("rtol", rtol, s.rows, numbers, contiguous);
  s.atol = tolerance("atol", atol, s.rows, numbers, contiguous);
  FMK_CHECK(segments.scalar_type() == ScalarType::Long && segments.dim() == 2 && segments.size(1) == 2,
            "segments: expected int64 [S, 2]");
  s.segments = static_cast<const int64_t*>(contiguous(segments));
  s.parts = segments.size(0);
  const bool whole = s.parts == 1 && s.segments[0] == 0 && s.segments[1] == numbers;
  s.simple_norm = whole && components == 1 && s.rtol.column_step == 0 && s.atol.column_step == 0 && !ratio;

  std::vector<double> wide_ratios;
  if (ratio) {
    const int64_t count = ratio->numel();
    FMK_CHECK(count == 1 || count == s.rows, "ratio: expected 1 or ", s.rows, " numbers, got ", count);
    wide_ratios.resize(count);
    load(wide_ratios.data(), contiguous(*ratio), ratio->scalar_type(), 0, count);
    s.ratios = wide_ratios.data(), s.ratio_step = count > 1;
  }
  if (t_eval) {
    s.times = t_eval->dim() > 0 ? t_eval->size(t_eval->dim() - 1) : 0;
    const bool each = t_eval->dim() == 2 && t_eval->size(0) > 1;
    FMK_CHECK(t_eval->scalar_type() == ScalarType::Double && solution && (!each || t_eval->size(0) == s.rows),
              "t_eval: expected float64 [M] or [B, M], with a solution");
    s.t_eval = static_cast<const double*>(contiguous(*t_eval));
    s.t_eval_step = each ? s.times : 0;
    s.solution = overwritten<void>("solution", *solution, s.k.type, s.rows * s.times * s.columns);
  }
  s.k.type == ScalarType::Double ? run<double>(s) : run<float>(s);

  int32_t running = 0;
  for (int64_t row = 0; row < s.rows; ++row) running += s.running(row);
  if (s.rows > 0) s.counters[COUNTER_RUNNING * s.rows] = running;
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("_runge_kutta_step_", TORCH_BOX(&fmk::runge_kutta_step)); }
