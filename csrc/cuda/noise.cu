// noise: random numbers [rows, columns].
#include "element.h"

namespace fmk::cuda {
namespace {

enum Distribution { NORMAL = 0, UNIFORM = 1 };

template <class T>
struct Noise {
  Grid grid;
  bool vector;
  const int64_t* key;
  int64_t first_row;
  uint32_t stream;
  int distribution;
  T* out;
};

template <class T>
__global__ void __launch_bounds__(BLOCK) noise_kernel(const __grid_constant__ Noise<T> n) {
  constexpr int V = WIDTH<T>;
  using C = typename compute<T>::type;
  const Place at(n.grid);
  if (at.row >= n.grid.rows) return;
  const uint64_t seed = uint64_t(*n.key);
  const int64_t row = n.first_row + at.row;
  for (int64_t chunk = at.chunk; chunk < at.end; chunk += n.grid.lanes) {
    const int64_t column = chunk * V;
    const int count = int(std::min<int64_t>(V, n.grid.columns - column));
    C out[V];
    if (n.distribution == NORMAL) {
      draw<T>(out, seed, row, chunk, n.stream);
    } else {
#pragma unroll
      for (int group = 0; group < V / 4; ++group) {
        const Words w = philox_row(seed, row, chunk * (V / 4) + group, n.stream);
        out[4 * group] = C(uniform(w.w0)), out[4 * group + 1] = C(uniform(w.w1));
        out[4 * group + 2] = C(uniform(w.w2)), out[4 * group + 3] = C(uniform(w.w3));
      }
    }
    store(n.out + at.row * n.grid.columns + column, out, count, n.vector);
  }
}

Tensor noise(const Tensor& key, int64_t rows, int64_t columns, int64_t first_row, int64_t stream, int64_t index,
             int64_t distribution, ScalarType type) {
  const Device device(key);
  const int64_t sizes[] = {rows, columns};
  Tensor out = empty_as(key, Sizes(sizes, 2), type);
  dispatch(type, [&]<class T>() {
    const Grid grid(rows, columns, WIDTH<T>);
    T* const p = data<T>(out);
    const bool vector = aligned(p) && rows_aligned(grid, WIDTH<T>);
    const Noise<T> arguments{
        grid, vector, data<const int64_t>(key), first_row, stream_word(stream, index), int(distribution), p};
    device.launch(noise_kernel<T>, arguments);
  });
  return out;
}

}  // namespace
}  // namespace fmk::cuda

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CUDA, m) { m.impl("noise", TORCH_BOX(&fmk::cuda::noise)); }
