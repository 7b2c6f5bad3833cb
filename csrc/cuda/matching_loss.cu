// matching_loss: residual, partial sums and gradient in one launch, the total in a second; and the gradient's scale in
// the backward.
#include "element.h"
#include "math/rho.h"
#include "torch/loss.h"
#include "torch/path.h"

namespace fmk::cuda {
namespace {

// P: the prediction and its gradient. X: x1, x0 and z. A: arithmetic.
template <class P, class X, class A>
struct Loss {
  Grid grid;
  bool vector, per_row;
  const int64_t* key;
  int64_t first_row;
  int terms, rho;
  A rho_k;
  const P* prediction;
  const X *x1, *x0, *z;
  Floats table, weight;
  const bool* mask;
  int64_t cover;      // elements under one value of the mask
  A gradient_factor;  // the reduction's divisor, where the forward already knows it
  P* gradient;
  double *sums, *counts;  // partial sums of w·ρ and counts: one a row and segment with per_row, else one a block
};

struct Total {
  Grid grid;  // outputs by parts
  int reduction;
  const double *sums, *counts;
  void *loss, *denominator;
  bool wide;
};

// Sum over aligned groups of `width` threads, a power of two up to BLOCK, in each group's first thread. The order is
// fixed. All threads of a block call it together.
template <class T>
__device__ T group_sum(T value, int width) {
  __shared__ T warps[BLOCK / 32];
  for (int offset = std::min(width, 32) / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (width > 32) {
    const int thread = thread_index(), warp = thread / 32;
    if (thread % 32 == 0) warps[warp] = value;
    __syncthreads();
    if (thread % width == 0) {
      for (int i = 1; i < width / 32; ++i) value += warps[warp + i];
    }
    __syncthreads();  // before the next call writes again
  }
  return value;
}

// Bit j says whether the mask keeps the element at offset + j, for j < count.
template <int V>
__device__ __forceinline__ uint32_t mask_bits(const bool* mask, int64_t cover, int64_t offset, int count) {
  int64_t cell = offset / cover, left = cover - (offset - cell * cover);
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (j < count && mask[cell]) bits |= 1u << j;
    if (--left == 0) ++cell, left = cover;
  }
  return bits;
}

template <class P, class X, class A>
__global__ void __launch_bounds__(BLOCK, RESIDENT<A, P, X>) loss_kernel(const __grid_constant__ Loss<P, X, A> l) {
  constexpr int V = WIDTH<P, X>;
  const Place at(l.grid);
  const uint64_t seed = uint64_t(*l.key);
  const bool inside = at.row < l.grid.rows;
  A sum = 0;
  int kept = 0;
  if (inside) {
    const int64_t cell = TABLE_COLUMNS * at.row;
    const A p = A(l.table[cell]), a = A(l.table[cell + 1]), b = A(l.table[cell + 2]), c = A(l.table[cell + 3]);
    const auto w = [&] { return A(l.table[cell + 4]) * (l.weight ? A(l.weight[at.row]) : A(1)); };
    const A slope = w() * p * l.gradient_factor;
    for (int64_t chunk = at.chunk; chunk < at.end; chunk += l.grid.lanes) {
      const int64_t column = chunk * V, offset = at.row * l.grid.columns + column;
      const int count = int(std::min<int64_t>(V, l.grid.columns - column));
      A r[V], x1[V];
      load(r, l.prediction + offset, count, l.vector);
      if (l.terms & TERM_X1) load(x1, l.x1 + offset, count, l.vector);
      const uint32_t keep = l.mask ? mask_bits<V>(l.mask, l.cover, offset, count) : (1u << count) - 1;
      kept += __popc(keep);

#pragma unroll
      for (int j = 0; j < V; ++j) r[j] *= p;
      if (l.terms & TERM_X1) {
#pragma unroll
        for (int j = 0; j < V; ++j) r[j] += a * x1[j];
      }
      const auto add_noise = [&](A coefficient, const X* given, Stream stream) {
        if (given) {
          A noise[V];
          load(noise, given + offset, count, l.vector);
#pragma unroll
          for (int j = 0; j < V; ++j) r[j] += coefficient * noise[j];
          return;
        }
#pragma unroll
        for (int g = 0; g < V / 4; ++g) {
          A n[4];
          draw_four<X>(n, seed, l.first_row + at.row, chunk * (V / 4) + g, stream_word(stream, 0));
#pragma unroll
          for (int j = 0; j < 4; ++j) r[4 * g + j] += coefficient * n[j];
        }
      };
      if (l.terms & TERM_X0) add_noise(b, l.x0, STREAM_X0);
      if (l.terms & TERM_Z) add_noise(c, l.z, STREAM_BRIDGE);

      // Elements that are left out are selected away, never multiplied: NaN stays out.
      const auto finish = [&](int kind) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const bool in = keep >> j & 1;
          sum += in ? rho(kind, l.rho_k, r[j]) : A(0);
          r[j] = in ? slope * d_rho(kind, l.rho_k, r[j]) : A(0);
        }
      };
      if (l.rho == RHO_SQUARE) {
        finish(RHO_SQUARE);
      } else if (l.rho == RHO_ABSOLUTE) {
        finish(RHO_ABSOLUTE);
      } else {
        finish(RHO_PSEUDO_HUBER);
      }
      if (l.gradient) store(l.gradient + offset, r, count, l.vector);
    }
    sum *= w();  // read again: no register is kept for it
  }

  const int width = l.per_row ? l.grid.lanes : BLOCK;
  sum = group_sum(sum, width);
  kept = group_sum(kept, width);
  if (thread_index() % width == 0 && inside) {
    const int64_t part = l.per_row ? at.row * l.grid.segments + at.segment : int64_t(blockIdx.x);
    l.sums[part] = double(sum);
    l.counts[part] = double(kept);
  }
}

__global__ void __launch_bounds__(BLOCK) total_kernel(const __grid_constant__ Total t) {
  const Place at(t.grid);
  const bool inside = at.row < t.grid.rows;
  double sum = 0, count = 0;
  if (inside) {
    for (int64_t part = at.chunk; part < at.end; part += t.grid.lanes) {
      sum += t.sums[at.row * t.grid.columns + part];
      count += t.counts[at.row * t.grid.columns + part];
    }
  }
  sum = group_sum(sum, t.grid.lanes);
  count = group_sum(count, t.grid.lanes);
  if (threadIdx.x == 0 && inside) {
    const double divisor = count > 1 ? count : 1;
    const double loss = t.reduction == REDUCE_SUM ? sum : sum / divisor;
    const auto write = [&](void* out, double value) {
      if (t.wide) {
        static_cast<double*>(out)[at.row] = value;
      } else {
        static_cast<float*>(out)[at.row] = float(value);
      }
    };
    write(t.loss, loss);
    if (t.denominator) write(t.denominator, divisor);
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& prediction_in, const Tensor& x1_in,
                                           const std::optional<Tensor>& x0_in, const std::optional<Tensor>& z_in,
                                           const Tensor& table_in, const std::optional<Tensor>& weight_in,
                                           const std::optional<Tensor>& mask_in, const Tensor& key, int64_t first_row,
                                           int64_t terms, int64_t rho, double rho_k, int64_t reduction, bool gradient) {
  const Device device(x1_in);
  const Tensor prediction = as_contiguous(prediction_in), x1 = as_contiguous(x1_in), table = as_contiguous(table_in);
  const auto x0 = as_contiguous(x0_in), z = as_contiguous(z_in), weight = as_contiguous(weight_in),
             mask = as_contiguous(mask_in);
  const int64_t numel = prediction.numel(), rows = table.numel() / TABLE_COLUMNS, columns = rows > 0 ? numel / rows : 0;
  FMK_CHECK(numel == x1.numel() && numel == rows * columns, "expected prediction and x1 of one size, in table's rows");
  FMK_CHECK(!x0 || x0->numel() == numel, "expected x0 of x1's size");
  FMK_CHECK(!z || z->numel() == numel, "expected z of x1's size");
  FMK_CHECK(!weight || weight->numel() == rows, "expected a weight a row");
  FMK_CHECK(!mask || (mask->numel() > 0 ? numel % mask->numel() == 0 : numel == 0),
            "expected a mask whose values cover equal runs");
  const bool wide = prediction.scalar_type() == ScalarType::Double || x1.scalar_type() == ScalarType::Double ||
                    table.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;

  const bool per_row = reduction == REDUCE_NONE, divides = gradient && mask && reduction != REDUCE_SUM;
  const int64_t none[] = {0};
  const Sizes sizes(table.sizes().data(), per_row ? table.sizes().size() - 1 : 0);
  Tensor loss = empty_as(x1, sizes, type);
  Tensor slopes = gradient ? empty_as(prediction) : empty_as(prediction, Sizes(none, 1));
  Tensor denominator = empty_as(x1, divides ? sizes : Sizes(none, 1), type);

  // The gradient is stored before the division by the element count where the quotient would underflow (float16) or the
  // count is not known yet (mask); see gradient_factor in fmkernels/ops/matching_loss.py.
  const bool divide = reduction == REDUCE_MEAN && !mask && prediction.scalar_type() != ScalarType::Half;
  const double factor = divide ? 1.0 / double(std::max<int64_t>(numel, 1)) : 1.0;

  const auto launch = [&]<class P, class X, class A>() {
    const Grid grid(rows, columns, WIDTH<P, X>);
    const int64_t parts = per_row ? rows * grid.segments : grid.blocks;
    const int64_t shape[] = {2, parts};
    const Tensor partials = empty_as(x1, Sizes(shape, 2), ScalarType::Double);
    double *const sums = data<double>(partials), *const counts = sums + parts;
    Loss<P, X, A> l{
        grid,
        rows_aligned(grid, WIDTH<P, X>),
        per_row,
        data<const int64_t>(key),
        first_row,
        int(terms),
        int(rho),
        A(rho_k),
        data<const P>(prediction),
        data<const X>(x1),
        data<const X>(x0),
        data<const X>(z),
        Floats(table),
        weight ? Floats(*weight) : Floats(),
        data<const bool>(mask),
        mask && mask->numel() > 0 ? numel / mask->numel() : 1,
        A(factor),
        gradient ? data<P>(slopes) : nullptr,
        sums,
        counts,
    };
    l.vector = l.vector && aligned(l.prediction, l.x1, l.x0, l.z, l.gradient);
    device.launch(loss_kernel<P, X, A>, l);
    const int64_t outputs = per_row ? rows : 1;
    device.launch(total_kernel,
                  Total{Grid(outputs, per_row ? grid.segments : parts, 1, false), int(reduction), sums, counts,
                        loss.mutable_data_ptr(), divides ? denominator.mutable_data_ptr() : nullptr, wide});
  };
  dispatch(prediction.scalar_type(), [&]<class P>() {
    dispatch(x1.scalar_type(), [&]<class X>() {
      if constexpr (!std::is_same_v<P, double> && !std::is_same_v<X, double>) {
        if (!wide) return launch.template operator()<P, X, float>();
      }
      launch.template operator()<P, X, double>();
    });
  });
  return {loss, slopes, denominator};
}

Tensor matching_loss(const Tensor& prediction, const Tensor& x1, const std::optional<Tensor>& x0,
                     const std::optional<Tensor>& z, const Tensor& table, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& mask, const Tensor& key, int64_t first_row, int64_t terms,
                     int64_t rho, double rho_k, int64_t reduction) {
  return std::get<0>(
      forward(prediction, x1, x0, z, table, weight, mask, key, first_row, terms, rho, rho_k, reduction, false));
}

template <class P, class A>
struct Scale {
  Grid grid;  // a row for each scale
  bool vector;
  const P* gradient;
  P* out;
  Floats scale, denominator;
  A factor;
};

// out = gradient · scale · factor / denominator; memory is left alone where out is the gradient and that product is 1.
template <class P, class A>
__global__ void __launch_bounds__(BLOCK) scale_kernel(const __grid_constant__ Scale<P, A> s) {
  constexpr int V = WIDTH<P>;
  const Place at(s.grid);
  if (at.row >= s.grid.rows) return;
  A by = A(s.scale[at.row]) * s.factor;
  if (s.denominator) by /= A(s.denominator[at.row]);
  if (s.out == s.gradient && by == A(1)) return;
  for (int64_t chunk = at.chunk; chunk < at.end; chunk += s.grid.lanes) {
    const int64_t column = chunk * V, offset = at.row * s.grid.columns + column;
    const int count = int(std::min<int64_t>(V, s.grid.columns - column));
    A g[V];
    load(g, s.gradient + offset, count, s.vector);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] *= by;
    store(s.out + offset, g, count, s.vector);
  }
}

void scale_into(const Tensor& gradient, const Tensor& out, const Tensor& scale_in, const Tensor& denominator_in,
                double factor) {
  const Device device(gradient);
  const Tensor scale = as_contiguous(scale_in), denominator = as_contiguous(denominator_in);
  const int64_t rows = scale.numel();
  if (gradient.numel() == 0 || rows == 0) return;
  FMK_CHECK(gradient.numel() % rows == 0, "expected a scale for equal runs of the gradient");
  FMK_CHECK(denominator.numel() == 0 || denominator.numel() == rows, "expected a denominator for each scale");
  const bool wide = gradient.scalar_type() == ScalarType::Double || scale.scalar_type() == ScalarType::Double;
  const auto launch = [&]<class P, class A>() {
    const Grid grid(rows, gradient.numel() / rows, WIDTH<P>);
    P* const to = data<P>(out);  // first: it may move memory that is copied on write
    const P* const from = data<const P>(gradient);
    const bool vector = aligned(from, to) && rows_aligned(grid, WIDTH<P>);
    const Floats divisor = denominator.numel() > 0 ? Floats(denominator) : Floats();
    device.launch(scale_kernel<P, A>, Scale<P, A>{grid, vector, from, to, Floats(scale), divisor, A(factor)});
  };
  dispatch(gradient.scalar_type(), [&]<class P>() {
    if constexpr (!std::is_same_v<P, double>) {
      if (!wide) return launch.template operator()<P, float>();
    }
    launch.template operator()<P, double>();
  });
}

Tensor scale_gradient(const Tensor& gradient_in, const Tensor& scale, const Tensor& denominator, double factor) {
  const Device device(gradient_in);
  const Tensor gradient = as_contiguous(gradient_in);
  Tensor out = empty_as(gradient);
  scale_into(gradient, out, scale, denominator, factor);
  return out;
}

void scale_gradient_(Tensor gradient, const Tensor& scale, const Tensor& denominator, double factor) {
  scale_into(gradient, gradient, scale, denominator, factor);
}

}  // namespace
}  // namespace fmk::cuda

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CUDA, m) {
  m.impl("matching_loss", TORCH_BOX(&fmk::cuda::matching_loss));
  m.impl("_matching_loss_forward", TORCH_BOX(&fmk::cuda::forward));
  m.impl("_scale_gradient", TORCH_BOX(&fmk::cuda::scale_gradient));
  m.impl("_scale_gradient_", TORCH_BOX(&fmk::cuda::scale_gradient_));
}
