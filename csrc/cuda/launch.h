// How a [rows, columns] tensor is cut into blocks of threads, and how a kernel is launched.
#pragma once

#include <algorithm>

#include "torch/tensor.h"

#ifndef __CUDACC__
#include "emulation.h"  // the same kernels as fibers on the host, for tests
#endif

namespace fmk::cuda {

constexpr int BLOCK = 256;        // threads
constexpr int64_t MAX_STEPS = 8;  // chunks a thread takes, one after the other
#ifdef __CUDACC__
constexpr int64_t THREADS = 512 * 1024;  // enough to fill any GPU: beyond it threads take several chunks
#else
constexpr int64_t THREADS = 1024;  // so that small tests go that way too
#endif
constexpr int64_t MAX_BLOCKS = (int64_t(1) << 31) - 1;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads take chunks of neighbouring columns. A block is `lanes` threads along a row by BLOCK / lanes rows; a row of
// more than lanes · steps chunks takes several blocks, its segments. The cut depends on the shape alone, so that sums
// are taken in the same order on every device.
struct Grid {
  int64_t rows, columns, chunks, blocks;
  uint32_t segments;  // blocks along a row
  int64_t steps;      // chunks a thread takes
  int lanes;          // threads along a row, a power of two

  // With split = false a row is never cut into segments.
  Grid(int64_t rows, int64_t columns, int width, bool split = true)
      : rows(rows), columns(columns), chunks(ceil_div(columns, width)), lanes(1) {
    const int64_t wanted = split ? std::clamp<int64_t>(rows * chunks / THREADS, 1, MAX_STEPS) : 1;
    while (lanes < BLOCK && lanes * wanted < chunks) lanes *= 2;
    segments = split ? uint32_t(std::max<int64_t>(ceil_div(chunks, lanes * wanted), 1)) : 1;
    steps = ceil_div(chunks, int64_t(lanes) * segments);
    blocks = ceil_div(rows, BLOCK / lanes) * segments;
  }
};

// A thread's place in the grid.
struct Place {
  int64_t first_row, row;  // of the block, of the thread; rows beyond the last are to be left out
  int64_t chunk, end;      // the thread's first chunk, the segment's end; the next chunks are `lanes` apart
  uint32_t segment;

  __device__ explicit Place(const Grid& grid) {
    const uint32_t tile = blockIdx.x / grid.segments;
    segment = blockIdx.x - tile * grid.segments;
    first_row = int64_t(tile) * blockDim.y;
    row = first_row + threadIdx.y;
    const int64_t span = grid.steps * grid.lanes, first = span * segment;
    chunk = first + threadIdx.x;
    end = std::min(first + span, grid.chunks);
  }
};

__device__ inline int thread_index() { return threadIdx.y * blockDim.x + threadIdx.x; }

#ifdef __CUDACC__
// An assignment would be split into four stores.
__device__ __forceinline__ void store16(uint4* p, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
#endif

// Makes a tensor's device current, and launches on its current stream. A kernel takes one struct, whose member `grid`
// says how it is cut.
class Device {
 public:
#ifdef __CUDACC__
  explicit Device(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
#else
  explicit Device(const Tensor&) {}
#endif

  template <class Arguments>
  void launch(void (*kernel)(Arguments), const Arguments& arguments) const {
    const Grid& grid = arguments.grid;
    if (grid.blocks == 0) return;
    FMK_CHECK(grid.blocks <= MAX_BLOCKS, "tensor too large for one launch: ", grid.rows, " rows of ", grid.columns);
    const dim3 blocks{unsigned(grid.blocks)}, threads{unsigned(grid.lanes), unsigned(BLOCK / grid.lanes)};
#ifdef __CUDACC__
    kernel<<<blocks, threads, 0, stream_>>>(arguments);
    FMK_LAUNCH_CHECK();
#else
    emulate(kernel, blocks, threads, arguments);
#endif
  }

#ifdef __CUDACC__
 private:
  DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

}  // namespace fmk::cuda
