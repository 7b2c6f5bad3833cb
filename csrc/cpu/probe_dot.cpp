// probe_dot: inner products of probes with given vectors; the probes are drawn a tile at a time and never stored.
#include "probe.h"
#include "stage.h"

namespace fmk {
namespace {

constexpr int64_t LANES = 32;  // columns of a sign word; a row's sum has as many parts until its end
constexpr int64_t ROWS = 16;

// Adds Σ_j term(row, j / 32, j % 32) to every row's sum: whole words with lanes over columns, the rest over rows.
template <class C, class F>
FMK_INLINE void add_rows(C* __restrict sums, int64_t rows, int64_t columns, const F& term) {
  const int64_t whole = columns / LANES, rest = columns % LANES;
  for (int64_t r = 0; r < (whole > 0 ? rows : 0); ++r) {
    C lanes[LANES] = {}, sum = 0;
    for (int64_t k = 0; k < whole; ++k) {
      for (int64_t l = 0; l < LANES; ++l) lanes[l] += term(r, k, l);
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t l = 0; l < LANES; ++l) sum += lanes[l];
    sums[r] += sum;
  }
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) {
    C lanes[ROWS] = {};
    for (int64_t l = 0; l < rest; ++l) {
      for (int64_t i = 0; i < ROWS; ++i) lanes[i] += term(r + i, whole, l);
    }
    for (int64_t i = 0; i < ROWS; ++i) sums[r + i] += lanes[i];
  }
  for (; r < rows; ++r) {
    C sum = 0;
    for (int64_t l = 0; l < rest; ++l) sum += term(r, whole, l);
    sums[r] += sum;
  }
}

template <class V, class C>
FMK_INLINE void add_signed(C* sums, const V* v, const uint32_t* words, int64_t rows, int64_t columns) {
  const int64_t per_row = words_per_row(columns);
  add_rows(sums, rows, columns, [=](int64_t r, int64_t k, int64_t l) __attribute__((always_inline)) {
    return with_sign(C(to_float(v[r * columns + k * LANES + l])), words[r * per_row + k], int(l));
  });
}

template <class V, class C>
FMK_INLINE void add_products(C* sums, const V* v, const C* z, int64_t rows, int64_t columns) {
  add_rows(sums, rows, columns, [=](int64_t r, int64_t k, int64_t l) __attribute__((always_inline)) {
    const int64_t j = r * columns + k * LANES + l;
    return z[j] * C(to_float(v[j]));
  });
}

// target_clones does not reach through templates, hence plain functions a combination of types.
#define FMK_ADD(V, C, CLONES)                                                                  \
  CLONES void add(C* sums, const V* v, const uint32_t* words, int64_t rows, int64_t columns) { \
    add_signed(sums, v, words, rows, columns);                                                 \
  }                                                                                            \
  CLONES void add(C* sums, const V* v, const C* z, int64_t rows, int64_t columns) {            \
    add_products(sums, v, z, rows, columns);                                                   \
  }
FMK_ADD(float, float, FMK_CLONES)
FMK_ADD(bf16, float, FMK_CLONES)
FMK_ADD(f16, float, FMK_CLONES)
FMK_ADD(double, double, FMK_CLONES)
#undef FMK_ADD

// The sums of a task's rows, in `sums`.
template <class V, class C>
void sum_task(const Probes& p, int64_t probe, const Block& task, const V* values, C* sums) {
  std::fill_n(sums, task.rows, C(0));
  const auto at = [&](const Block& tile) { return values + (probe * p.rows + tile.row) * p.columns + tile.column; };
  if (p.signs()) {
    alignas(64) uint32_t words[SIGN_WORDS];
    for_sign_tiles(task, [&](const Block& tile) {
      sign_words(words, p, probe, tile);
      add(sums + (tile.row - task.row), at(tile), words, tile.rows, tile.count);
    });
  } else {
    alignas(64) C z[TILE];
    for_tiles(task, [&](const Block& tile) {
      normals(z, p.seed, p.first_row, tile, p.stream(probe), scalar_type_of<V>);
      add(sums + (tile.row - task.row), at(tile), z, tile.rows, tile.count);
    });
  }
}

template <class V, class C>
void run(const Probes& p, const V* values, C* out) {
  const Cut cut(p.rows, p.columns, TASK);
  std::vector<C> parts(cut.spans > 1 ? p.count * cut.blocks() : 0);
  for_probes(p, cut, [&](int64_t probe, const Block& task, int64_t i) {
    C* sums = parts.empty() ? out + probe * p.rows + task.row : parts.data() + probe * cut.blocks() + i;
    sum_task(p, probe, task, values, sums);
  });
  if (p.columns == 0) std::fill_n(out, p.count * p.rows, C(0));
  if (parts.empty()) return;
  for (int64_t row = 0; row < p.count * p.rows; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < cut.spans; ++i) sum += double(parts[row * cut.spans + i]);
    out[row] = C(sum);
  }
}

Tensor probe_dot(const Tensor& key, const Tensor& values_in, int64_t distribution, int64_t first, int64_t first_row) {
  FMK_CHECK(values_in.dim() >= 2, "expected values of shape [probes, rows, ...]");
  const Tensor values = as_contiguous(values_in);
  const int64_t count = values.size(0), rows = values.size(1), sizes[] = {count, rows};
  const bool wide = values.scalar_type() == ScalarType::Double;
  Tensor out = empty_as(values, Sizes(sizes, 2), wide ? ScalarType::Double : ScalarType::Float);
  int64_t columns = 1;
  for (int64_t d = 2; d < values.dim(); ++d) columns *= values.size(d);
  const Probes p(key, distribution, count, first, rows, columns, first_row);
  dispatch(values.scalar_type(), [&]<class V>() {
    using C = std::conditional_t<std::is_same_v<V, double>, double, float>;
    run(p, data<const V>(values), data<C>(out));
  });
  return out;
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("probe_dot", TORCH_BOX(&fmk::probe_dot)); }
