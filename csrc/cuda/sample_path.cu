// sample_path: draw t and noise, form x_t and the row table, in one launch.
#include "element.h"
#include "torch/path.h"

namespace fmk::cuda {
namespace {

// T: elements. Time: times and coefficients.
template <class T, class Time>
struct Path {
  Grid grid;
  bool vector, bridge;
  PathDescription description;
  const int64_t* key;
  int64_t first_row, strata;
  const Time *t, *coefficients;
  const T *x1, *x0;
  T *x_t, *stored_x0, *stored_z;
  Time *t_out, *table;
};

template <class T, class Time>
__global__ void __launch_bounds__(BLOCK, RESIDENT<typename compute<T>::type, T>)
    path_kernel(const __grid_constant__ Path<T, Time> p) {
  constexpr int V = WIDTH<T>;
  using C = typename compute<T>::type;
  __shared__ C alpha[BLOCK], sigma[BLOCK], gamma[BLOCK];  // of the block's rows
  const Place at(p.grid);
  const uint64_t seed = uint64_t(*p.key);

  // One thread a row evaluates its coefficients; the others meanwhile draw.
  const int thread = thread_index();
  if (const int64_t row = at.first_row + thread; thread < int(blockDim.y) && row < p.grid.rows) {
    const PathRow<Time> r = path_row(p.description, seed, row, p.first_row, p.strata, p.t, p.coefficients);
    alpha[thread] = C(r.alpha), sigma[thread] = C(r.sigma), gamma[thread] = C(r.gamma);
    if (at.segment == 0) {
      p.t_out[row] = r.t;
      write_table(p.table, row, r.loss);
    }
  }

  for (int64_t step = 0; step < p.grid.steps; ++step) {
    const int64_t chunk = at.chunk + step * p.grid.lanes, column = chunk * V;
    const bool active = at.row < p.grid.rows && chunk < at.end;
    const int count = int(std::min<int64_t>(V, p.grid.columns - column));
    const int64_t offset = at.row * p.grid.columns + column;
    C x1[V], x0[V], z[V];
    if (active) {
      load(x1, p.x1 + offset, count, p.vector);
      if (p.x0) {
        load(x0, p.x0 + offset, count, p.vector);
      } else {
        draw<T>(x0, seed, p.first_row + at.row, chunk, stream_word(STREAM_X0, 0));
      }
      if (p.bridge) draw<T>(z, seed, p.first_row + at.row, chunk, stream_word(STREAM_BRIDGE, 0));
    }
    if (step == 0) __syncthreads();
    if (active) {
      if (p.stored_x0) store(p.stored_x0 + offset, x0, count, p.vector);
      if (p.stored_z) store(p.stored_z + offset, z, count, p.vector);
      const C a = alpha[threadIdx.y], s = sigma[threadIdx.y], g = gamma[threadIdx.y];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        x1[j] = a * x1[j] + s * x0[j];
        if (p.bridge) x1[j] += g * z[j];
      }
      store(p.x_t + offset, x1, count, p.vector);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_path(
    const Tensor& x1_in, const std::optional<Tensor>& x0_in, const std::optional<Tensor>& t_in,
    const std::optional<Tensor>& coefficients_in, const Tensor& key, int64_t first_row, int64_t strata, int64_t t_dims,
    int64_t schedule, double s0, double s1, double t_low, double t_high, bool bridge, int64_t sampler, double q0,
    double q1, double shift, int64_t prediction, int64_t compare, double o0, int64_t weight, double weight_k,
    int64_t store) {
  const Device device(x1_in);
  const Tensor x1 = as_contiguous(x1_in);
  const auto x0 = as_contiguous(x0_in), coefficients = as_contiguous(coefficients_in);
  auto t = as_contiguous(t_in);
  const ScalarType type = x1.scalar_type();
  const bool wide = type == ScalarType::Double || (t && t->scalar_type() == ScalarType::Double);
  const ScalarType time_type = wide ? ScalarType::Double : ScalarType::Float;
  // Times given in float32 beside float64 data are widened first, the one case with a second launch.
  if (t && t->scalar_type() != time_type) t = torch::stable::to(*t, time_type);

  const Sizes sizes = x1.sizes();
  FMK_CHECK(t_dims >= 0 && t_dims <= int64_t(sizes.size()), "expected t_dims within the dimensions of x1");
  FMK_CHECK(!(store & STORE_Z) || bridge, "expected store without z where there is no bridge");
  std::vector<int64_t> shape(sizes.begin(), sizes.begin() + t_dims);
  int64_t rows = 1;
  for (const int64_t size : shape) rows *= size;
  const int64_t columns = rows > 0 ? x1.numel() / rows : 0;
  FMK_CHECK(!x0 || x0->numel() == x1.numel(), "expected x0 of x1's size");
  FMK_CHECK(!t || t->numel() == rows, "expected a time a row");
  FMK_CHECK(!coefficients || coefficients->numel() == 6 * rows, "expected six coefficients a row");

  Tensor t_out = empty_as(x1, Sizes(shape.data(), shape.size()), time_type);
  shape.push_back(TABLE_COLUMNS);
  Tensor table = empty_as(x1, Sizes(shape.data(), shape.size()), time_type);
  const int64_t none[] = {0};
  Tensor x_t = empty_as(x1);
  Tensor stored_x0 = store & STORE_X0 ? empty_as(x1) : empty_as(x1, Sizes(none, 1));
  Tensor stored_z = store & STORE_Z ? empty_as(x1) : empty_as(x1, Sizes(none, 1));

  const auto launch = [&]<class T, class Time>() {
    const Grid grid(rows, columns, WIDTH<T>);
    Path<T, Time> p{
        grid,
        rows_aligned(grid, WIDTH<T>),
        bridge,
        {int(schedule), s0, s1, t_low, t_high, int(sampler), q0, q1, shift, int(prediction), int(compare), o0,
         int(weight), weight_k},
        data<const int64_t>(key),
        first_row,
        strata,
        data<const Time>(t),
        data<const Time>(coefficients),
        data<const T>(x1),
        data<const T>(x0),
        data<T>(x_t),
        store & STORE_X0 ? data<T>(stored_x0) : nullptr,
        store & STORE_Z ? data<T>(stored_z) : nullptr,
        data<Time>(t_out),
        data<Time>(table),
    };
    p.vector = p.vector && aligned(p.x1, p.x0, p.x_t, p.stored_x0, p.stored_z);
    device.launch(path_kernel<T, Time>, p);
  };
  dispatch(type, [&]<class T>() {
    if constexpr (!std::is_same_v<T, double>) {
      if (!wide) return launch.template operator()<T, float>();
    }
    launch.template operator()<T, double>();
  });
  return {x_t, t_out, table, stored_x0, stored_z};
}

}  // namespace
}  // namespace fmk::cuda

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CUDA, m) { m.impl("sample_path", TORCH_BOX(&fmk::cuda::sample_path)); }
