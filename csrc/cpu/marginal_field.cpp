// marginal_field: moments of softmax weights over a dataset that is streamed past tiles of queries.
//
// A tile of logits comes from torch's matrix product, of the points and the queries less α times the data's centre c:
//     -‖x - αx_j‖²/(2σ²) = α/σ² (y·x_j - α ½‖x_j - c‖²) - ‖y‖²/(2σ²) - α/σ² y·c,  y = x - αc.
// Of each query the points that weigh most are kept apart, in a list; at the end their logits are taken again from
// differences in double, and the moments about the heaviest of them. All others are added up, by a second product where
// they are many in a tile and one by one where they are few: near the data nearly every tile has none.
//
// In few dimensions, or of little data, a product is no faster than differences, and many points may be so near to a
// query that its rounding would matter. There logits are taken about a base b, a point of the data near the heaviest,
// and so are the sums:
//     -‖x - αx_j‖²/(2σ²) = α/σ² (x_j - b)·(r - α/2 (x_j - b)) - ‖r‖²/(2σ²),  r = x - αb.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "marginal_loops.h"
#include "torch/tensor.h"

namespace fmk {
namespace {

constexpr int64_t MAX_QUERIES = 128, POINTS = 512;  // of a tile of logits, which stays in the second cache
constexpr int64_t COLUMNS = 1024;                   // of the second product at once
constexpr int64_t DIRECT = 16;                      // dimensions up to which differences are taken
constexpr int64_t SMALL = 1 << 18;                  // differences up to which they are, whatever the dimension
constexpr int64_t SPARSE = 8;      // points that weigh something are added one by one where fewer than 1 in so many
constexpr int64_t CAPACITY = 512;  // of a query's list
constexpr int64_t ENOUGH = 64;     // of it that is used where the products are precise
constexpr double PRECISE = 1e-4;   // error of a logit above which as many points as the list holds are taken again
constexpr double NEAR = 2;         // how far a logit may lie above that of the base
constexpr double REBASE = 16;      // how far the largest logit may rise before what is added up is scaled anew

constexpr double INF = std::numeric_limits<double>::infinity();

// ---- products ---------------------------------------------------------------------------------------------------

// A matrix over memory that is not owned.
template <class T>
Tensor matrix(const Tensor& like, const T* p, int64_t rows, int64_t columns, int64_t row_stride, int64_t stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, stride};
  return torch::stable::from_blob(const_cast<T*>(p), {sizes, 2}, {strides, 2}, like.device(), scalar_type_of<T>);
}

void multiply(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// Whether products of floats are rounded to less than float, as torch.set_float32_matmul_precision allows.
bool products_are_rounded(const Tensor& like) {
  constexpr int64_t n = 32;  // smaller ones never are
  std::vector<float> a(n * n, 1.0f + 0x1p-20f), b(n * n, 0.0f), out(n * n);
  for (int64_t i = 0; i < n; ++i) b[i * n + i] = 1.0f;
  Tensor product = matrix(like, out.data(), n, n, n, 1);
  multiply(product, matrix(like, a.data(), n, n, n, 1), matrix(like, b.data(), n, n, n, 1));
  return out[0] != a[0];
}

bool takes_differences(int64_t rows, int64_t points, int64_t dims) {
  return dims <= DIRECT || rows * points <= SMALL / dims;
}

// ---- the state of a query -----------------------------------------------------------------------------------------

template <class T>
struct Entry {
  int64_t point;
  T logit;
};

template <class T>
struct Query {
  const T* x;
  T* sum;         // Σ p x_i of the points added up, where the mean will stand; direct: Σ p (x_i - b)
  T* rest;        // y, direct: r, where the residual will stand
  const T* base;  // direct: b
  Entry<T>* list;
  double alpha, sigma, shift;     // from logits of products to those of distances
  T scale, negative_square;       // α/σ², -α²/σ²
  T cut;                          // points so far below the largest logit are left out
  double error;                   // bound on that of a logit
  int64_t capacity, count = 0;    // of the list
  T peak, bar;                    // the largest logit; above this a point goes into the list
  double reference = -INF;        // p = e^(logit - reference)
  double weight = 0, moment = 0;  // Σ p, Σ p ½‖x_i - c‖²; direct: about b

  int64_t kept() const { return capacity / 4; }
};

template <class T>
struct Problem {
  int64_t rows, points, dims;
  const T *x, *data, *centre;
  const double *alpha, *sigma, *log_weights, *halves;
  double norm, radius;  // largest of a point, and from the centre
  T *mean, *residual;
  double *log_sum, *kappa;
  bool direct;  // by differences
};

// Moves the base to another point, and all that is taken about it.
template <class T>
void move_base(Query<T>& q, const Problem<T>& p, int64_t point) {
  const T* to = p.data + point * p.dims;
  double logit = 0;
  for (int64_t j = 0; j < p.dims; ++j) {
    const double step = double(to[j]) - double(q.base[j]), r = double(q.x[j]) - q.alpha * double(q.base[j]);
    logit += step * (r - 0.5 * q.alpha * step);
    if (q.reference != -INF) {
      q.moment += step * (0.5 * q.weight * step - double(q.sum[j]));
      q.sum[j] = T(double(q.sum[j]) - q.weight * step);
    }
    q.rest[j] = T(double(q.x[j]) - q.alpha * double(to[j]));
  }
  logit *= q.alpha / (q.sigma * q.sigma);
  q.base = to, q.shift = 0.5 * squared_distance(q.x, to, q.alpha, p.dims) / (q.sigma * q.sigma);
  q.peak = T(q.peak - logit), q.bar = T(q.bar - logit), q.reference -= logit;
  for (int64_t i = 0; i < q.count; ++i) q.list[i].logit = T(q.list[i].logit - logit);
}

// Scales what is added up so that the largest logit is near the reference.
template <class T>
void rebase(Query<T>& q, const Problem<T>& p) {
  if (q.peak <= q.reference + REBASE) return;
  if (q.reference == -INF) {
    std::fill(q.sum, q.sum + p.dims, T(0));
  } else {
    const double factor = std::exp(q.reference - q.peak);
    scale(q.sum, T(factor), p.dims);
    q.weight *= factor, q.moment *= factor;
  }
  q.reference = q.peak;
}

// Makes room in the list: what no longer weighs anything goes, then what weighs least is added up.
template <class T>
void thin(Query<T>& q, const Problem<T>& p) {
  const T floor = q.peak - q.cut;
  Entry<T>* end = std::remove_if(q.list, q.list + q.count, [&](const Entry<T>& e) { return e.logit < floor; });
  q.count = end - q.list;
  if (q.count <= q.capacity / 2) return;
  Entry<T>* rest = q.list + q.kept();
  std::nth_element(q.list, rest - 1, end, [](const Entry<T>& a, const Entry<T>& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.point < b.point);
  });
  q.bar = rest[-1].logit;
  rebase(q, p);
  for (const Entry<T>* e = rest; e != end; ++e) {
    const T weight = T(std::exp(double(e->logit) - q.reference)), *point = p.data + e->point * p.dims;
    q.weight += weight;
    if (p.direct) {
      q.moment += add_columns(q.sum, point, &weight, q.base, 1, p.dims);
    } else {
      add(q.sum, point, weight, p.dims);
      q.moment += weight * p.halves[e->point];
    }
  }
  q.count = q.kept();
}

template <class T>
void push(Query<T>& q, const Problem<T>& p, int64_t point, T logit) {
  if (q.count == q.capacity) thin(q, p);
  q.list[q.count++] = {point, logit};
}

// Moves the points above the bar from a tile to the list.
template <class T>
void take(Query<T>& q, const Problem<T>& p, T* s, int64_t first, int64_t n, T bar, int64_t most, bool equal) {
  for (int64_t j = 0; j < n && most > 0; ++j) {
    if (equal ? s[j] == bar : s[j] > bar) {
      push(q, p, first + j, s[j]);
      s[j] = -std::numeric_limits<T>::infinity();
      --most;
    }
  }
}

// What a tile of logits s with its largest adds to a query. Returns true where its points are many: then `out`, which
// may be s, holds the weights of those that are to be added up together.
template <class T>
bool visit(Query<T>& q, const Problem<T>& p, T top, T* s, T* out, T* scratch, const T* halves, int64_t first,
           int64_t n) {
  if (!(top > q.peak - q.cut)) return false;
  q.peak = std::max(q.peak, top);
  const T floor = q.peak - q.cut;
  const int64_t count = count_above(s, floor, n);
  if (count * SPARSE <= n || q.count + count <= q.capacity) {
    take(q, p, s, first, n, floor, count, false);
    return false;
  }
  T bar = std::max(floor, q.bar);
  const int64_t kept = q.kept();
  int64_t higher = count_above(s, bar, n);
  if (higher > kept) {
    std::copy(s, s + n, scratch);
    std::nth_element(scratch, scratch + (kept - 1), scratch + n, std::greater<T>());
    q.bar = bar = scratch[kept - 1];
    higher = count_above(s, bar, n);
    take(q, p, s, first, n, bar, kept - higher, true);
  }
  take(q, p, s, first, n, bar, higher, false);
  rebase(q, p);
  double moment = 0;
  exponentiate(out, s, halves, T(q.reference), n, q.weight, moment);
  if (!p.direct) q.moment += moment;
  return true;
}

// The moments from the list, taken again from differences, and what was added up.
template <class T>
void conclude(Query<T>& q, const Problem<T>& p, int64_t row, double* delta) {
  T *mean = p.mean + row * p.dims, *residual = p.residual + row * p.dims;
  const double half_precision = 0.5 / (q.sigma * q.sigma);
  const T floor = q.peak - q.cut;
  double best = -INF, expected = 0;
  int64_t star = -1;
  std::sort(q.list, q.list + q.count, [](const Entry<T>& a, const Entry<T>& b) { return a.point < b.point; });
  std::vector<double> logits(q.count);
  for (int64_t i = 0; i < q.count; ++i) {
    const Entry<T>& e = q.list[i];
    logits[i] = -INF;
    if (e.logit < floor) continue;
    const double distance = squared_distance(q.x, p.data + e.point * p.dims, q.alpha, p.dims);
    logits[i] = (p.log_weights ? p.log_weights[e.point] : 0) - distance * half_precision;
    if (logits[i] > best) best = logits[i], star = i, expected = e.logit;
  }
  if (star < 0) {  // NaN or infinities came in
    std::fill(mean, mean + p.dims, T(NAN));
    std::fill(residual, residual + p.dims, T(NAN));
    p.log_sum[row] = p.kappa[row] = NAN;
    return;
  }
  // From logits of products to those of distances; where products are far off, those of near points are so alike.
  const double shift = q.error > 1 ? expected - best : q.shift;
  const double factor = q.reference == -INF ? 0 : std::exp(q.reference - shift - best);
  const double rest = factor * q.weight;
  double total = rest, spread = 2 * factor * q.moment, square = 0;
  for (double& logit : logits) total += logit = std::exp(logit - best);
  const T* at = p.data + q.list[star].point * p.dims;
  Added<T> added{at, at, factor, rest, 0.0};
  if (factor != 0) added = {q.sum, p.direct ? q.base : p.centre, factor, rest, p.direct ? 0.0 : rest};
  for (int64_t c = 0; c < p.dims; c += COLUMNS) {
    const int64_t n = std::min(COLUMNS, p.dims - c);
    std::fill(delta, delta + n, 0.0);
    for (int64_t i = 0; i < q.count; ++i) {
      if (i == star || logits[i] == 0) continue;
      spread += logits[i] * add_difference(delta, p.data + q.list[i].point * p.dims + c, at + c, logits[i], n);
    }
    const auto [part, more] = finish(mean + c, residual + c, q.x + c, at + c, added, delta, q.alpha, total, n);
    square += part, spread += more;
    added.acc += n, added.origin += n;
  }
  p.kappa[row] = std::max(spread / total - square, 0.0);
  p.log_sum[row] = best + std::log(total) - (p.log_weights ? 0 : std::log(double(p.points)));
}

template <class T>
Query<T> query(const Problem<T>& p, int64_t row, Entry<T>* list) {
  constexpr double unit = std::numeric_limits<T>::epsilon() / 2, rounding = sizeof(T) == 4 ? 25 : 45;
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  Query<T> q;
  q.x = p.x + row * p.dims, q.sum = p.mean + row * p.dims, q.list = list;
  q.alpha = p.alpha[row], q.sigma = p.sigma[row];
  q.rest = p.residual + row * p.dims;
  const double variance = q.sigma * q.sigma, reach = q.alpha * p.radius;
  q.shift = q.error = 0;
  q.scale = T(q.alpha / variance), q.negative_square = T(-q.alpha * q.alpha / variance);
  if (!p.direct) {
    const auto [square, dot] = centre(q.rest, q.x, p.centre, q.alpha, p.dims);
    q.shift = (0.5 * square + q.alpha * dot) / variance;
    q.error = 8 * unit * (std::sqrt(square) * q.alpha * p.norm + reach * reach) / variance;
  }
  q.cut = T(rounding + std::log(double(p.points)) + 2 * q.error);
  q.capacity = q.error > PRECISE ? CAPACITY : ENOUGH;
  q.peak = q.bar = nothing;
  q.base = p.data;
  if (p.direct) move_base(q, p, 0);
  return q;
}

// Buffers of a thread.
template <class T>
struct Workspace {
  T *s, *block, *halves, *weights;
  Entry<T>* lists;
  double* delta;
};

// A tile of points passes the queries, by differences.
template <class T>
void pass_directly(const Problem<T>& p, std::vector<Query<T>>& queries, const Workspace<T>& w, int64_t first,
                   int64_t n) {
  const T* tile = p.data + first * p.dims;
  T *columns = w.block, *s = w.s;
  for (int64_t d = 0; d < p.dims; ++d) {
    for (int64_t j = 0; j < n; ++j) columns[d * n + j] = tile[j * p.dims + d];
  }
  for (Query<T>& q : queries) {
    const auto logits = [&] {
      return from_differences(s, columns, w.weights, q.rest, q.base, T(0.5 * q.alpha), q.scale, n, p.dims);
    };
    T top = logits();
    if (top > NEAR) {
      move_base(q, p, first + (std::max_element(s, s + n) - s));
      top = logits();
    }
    if (visit(q, p, top, s, s, s + POINTS, w.halves, first, n)) {
      q.moment += add_columns(q.sum, columns, s, q.base, n, p.dims);
    }
  }
}

// A tile of points passes the queries, by products.
template <class T>
void pass(const Problem<T>& p, const Tensor& y, std::vector<Query<T>>& queries, const Workspace<T>& w, int64_t first,
          int64_t n, std::vector<int64_t>& many) {
  const int64_t rows = queries.size();
  const T* tile = p.data + first * p.dims;
  Tensor products = matrix(y, w.s, rows, n, n, 1);
  multiply(products, y, matrix(y, tile, p.dims, n, 1, p.dims));
  many.clear();
  for (int64_t r = 0; r < rows; ++r) {  // the weights of those with many points move up to the first rows
    Query<T>& q = queries[r];
    T *s = w.s + r * n, *out = w.s + int64_t(many.size()) * n;
    const T top = to_logits(s, w.halves, w.weights, q.scale, q.negative_square, n);
    if (visit(q, p, top, s, out, w.block, w.halves, first, n)) many.push_back(r);
  }
  if (many.empty()) return;
  const Tensor weights = matrix(y, w.s, many.size(), n, n, 1);
  for (int64_t c = 0; c < p.dims; c += COLUMNS) {
    const int64_t count = std::min(COLUMNS, p.dims - c);
    Tensor sums = matrix(y, w.block, many.size(), count, count, 1);
    multiply(sums, weights, matrix(y, tile + c, n, count, p.dims, 1));
    for (size_t i = 0; i < many.size(); ++i) add(queries[many[i]].sum + c, w.block + i * count, T(1), count);
  }
}

template <class T>
void run_tile(const Problem<T>& p, const Tensor& like, int64_t first_row, int64_t rows, const Workspace<T>& w) {
  std::vector<Query<T>> queries;
  std::vector<int64_t> many;
  for (int64_t r = 0; r < rows; ++r) queries.push_back(query(p, first_row + r, w.lists + r * CAPACITY));
  const Tensor y = matrix(like, p.residual + first_row * p.dims, rows, p.dims, p.dims, 1);
  for (int64_t first = 0; first < p.points; first += POINTS) {
    const int64_t n = std::min(POINTS, p.points - first);
    for (int64_t j = 0; j < n; ++j) {
      w.halves[j] = T(p.halves[first + j]), w.weights[j] = p.log_weights ? T(p.log_weights[first + j]) : T(0);
    }
    if (p.direct) {
      pass_directly(p, queries, w, first, n);
    } else {
      pass(p, y, queries, w, first, n, many);
    }
  }
  for (int64_t r = 0; r < rows; ++r) conclude(queries[r], p, first_row + r, w.delta);
}

template <class T>
void run(const Problem<T>& p, const Tensor& like) {
  // As many tiles as threads may want, of as many queries as a product is fast with: a matter of the shape alone.
  const int64_t queries = std::clamp<int64_t>((p.rows + 7) / 8, 16, MAX_QUERIES);
  const int64_t most = std::max<int64_t>(2, std::min(queries, p.rows));
  const int64_t block_elements =
      std::max(most * std::min(COLUMNS, p.dims), std::min(POINTS, p.points) * (p.direct ? p.dims + 1 : 1));
  const auto workspace = [&]<class U>(int64_t count, U) { return empty_as(like, {&count, 1}, scalar_type_of<U>); };
  parallel_for(0, (p.rows + queries - 1) / queries, 1, [&](int64_t begin, int64_t end) {
    const Tensor s = workspace(most * POINTS, T()), block = workspace(block_elements, T());
    const Tensor halves = workspace(POINTS, T()), weights = workspace(POINTS, T()), delta = workspace(COLUMNS, 0.0);
    const Tensor lists = workspace(most * CAPACITY * int64_t(sizeof(Entry<T>)), uint8_t());
    const Workspace<T> w{data<T>(s),
                         data<T>(block),
                         data<T>(halves),
                         data<T>(weights),
                         reinterpret_cast<Entry<T>*>(data<uint8_t>(lists)),
                         data<double>(delta)};
    for (int64_t i = begin; i < end; ++i) {
      run_tile(p, like, i * queries, std::min(queries, p.rows - i * queries), w);
    }
  });
}

// The mean of the points, and ½‖x_i - c‖² about it.
template <class T>
std::pair<Tensor, Tensor> measure(const Tensor& points) {
  const int64_t count = points.size(0), dims = points.size(1);
  Tensor centre = empty_as(points, {&dims, 1}), halves = empty_as(points, {&count, 1}, ScalarType::Double);
  const T* p = data<const T>(points);
  T* c = data<T>(centre);
  double* out = data<double>(halves);
  parallel_for(0, dims, COLUMNS, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(end - begin);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = begin; j < end; ++j) sums[j - begin] += double(p[i * dims + j]);
    }
    for (int64_t j = begin; j < end; ++j) c[j] = T(sums[j - begin] / double(count));
  });
  parallel_for(0, count, std::max<int64_t>(1, TASK / std::max<int64_t>(dims, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = 0.5 * squared_distance(p + i * dims, c, 1.0, dims);
  });
  return {centre, halves};
}

using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Moments moments(const Tensor& x, const Tensor& alpha, const Tensor& sigma, const Tensor& points,
                const std::optional<Tensor>& log_weights, const std::optional<Tensor>& given_centre,
                const std::optional<Tensor>& given_halves) {
  const int64_t rows = x.size(0);
  Tensor mean = empty_as(x), residual = empty_as(x);
  Tensor log_sum = empty_as(x, {&rows, 1}, ScalarType::Double), kappa = empty_as(x, {&rows, 1}, ScalarType::Double);
  const int64_t count = points.size(0), dims = points.size(1);
  const bool given = given_centre && given_halves;
  const auto [centre, halves] = given ? std::pair{*given_centre, *given_halves} : measure<T>(points);
  const T* c = data<const T>(centre);
  const double* h = data<const double>(halves);
  const double radius = std::sqrt(2 * *std::max_element(h, h + count));
  const double norm = radius + std::sqrt(squared_distance(c, c, 0.0, dims));
  run<T>({rows, count, dims, data<const T>(x), data<const T>(points), c, data<const double>(alpha),
          data<const double>(sigma), data<const double>(log_weights), h, norm, radius, data<T>(mean), data<T>(residual),
          data<double>(log_sum), data<double>(kappa), takes_differences(rows, count, dims)},
         x);
  return {mean, residual, log_sum, kappa};
}

Moments marginal_field(const Tensor& x_in, const Tensor& alpha_in, const Tensor& sigma_in, const Tensor& data_in,
                       const std::optional<Tensor>& log_weights_in, const std::optional<Tensor>& centre_in,
                       const std::optional<Tensor>& halves_in) {
  const Tensor x = as_contiguous(x_in), alpha = as_contiguous(alpha_in), sigma = as_contiguous(sigma_in);
  const Tensor points = as_contiguous(data_in);
  const auto log_weights = as_contiguous(log_weights_in), halves = as_contiguous(halves_in);
  const auto centre = as_contiguous(centre_in);
  FMK_CHECK(x.dim() == 2 && points.dim() == 2 && points.size(1) == x.size(1) && points.size(0) > 0,
            "x is [B, D] and data [N, D]");
  FMK_CHECK(alpha.numel() == x.size(0) && sigma.numel() == x.size(0), "alpha and sigma are [B]");
  FMK_CHECK(!log_weights || log_weights->numel() == points.size(0), "log_weights is [N]");
  FMK_CHECK(!halves || halves->numel() == points.size(0), "half_squares is [N]");
  FMK_CHECK(!centre || centre->numel() == points.size(1), "centre is [D]");
  if (x.scalar_type() == ScalarType::Double)
    return moments<double>(x, alpha, sigma, points, log_weights, centre, halves);
  if (takes_differences(x.size(0), points.size(0), x.size(1)) || !products_are_rounded(x)) {
    return moments<float>(x, alpha, sigma, points, log_weights, centre, halves);
  }
  const auto as = [](const Tensor& tensor, ScalarType type) {
    Tensor out = empty_as(tensor, type);
    torch::stable::copy_(out, tensor);
    return out;
  };
  const auto [mean, residual, log_sum, kappa] = moments<double>(
      as(x, ScalarType::Double), alpha, sigma, as(points, ScalarType::Double), log_weights, std::nullopt, std::nullopt);
  return {as(mean, ScalarType::Float), as(residual, ScalarType::Float), log_sum, kappa};
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("marginal_field", TORCH_BOX(&fmk::marginal_field)); }
