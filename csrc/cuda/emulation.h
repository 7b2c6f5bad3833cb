// The part of CUDA that the kernels here use, on the host: the threads of a block are fibers that take turns at
// barriers. Compiled as C++, the .cu files answer on the CPU, so that tests run them where there is no GPU.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace fmk::cuda {

struct Fibers {
  static constexpr size_t STACK = 64 * 1024;
  dim3 thread, size, block;
  unsigned current = 0;
  ucontext_t scheduler;
  std::vector<ucontext_t> contexts;
  std::vector<char> done, stacks;
  std::vector<uint4> slots;  // values on their way between the threads of a warp
  void (*call)(const void*) = nullptr;
  const void* argument = nullptr;

  void run_block();
  void barrier() { swapcontext(&contexts[current], &scheduler); }
};
inline Fibers fibers;

inline void fiber_entry() {
  fibers.call(fibers.argument);
  fibers.done[fibers.current] = 1;
}

// Runs every thread to its next barrier, forwards and backwards in turn, so that a missing barrier shows.
inline void Fibers::run_block() {
  const unsigned threads = size.x * size.y;
  contexts.resize(threads), slots.resize(threads), stacks.resize(threads * STACK);
  done.assign(threads, 0);
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&contexts[i]);
    contexts[i].uc_stack.ss_sp = &stacks[i * STACK];
    contexts[i].uc_stack.ss_size = STACK;
    contexts[i].uc_link = &scheduler;
    makecontext(&contexts[i], fiber_entry, 0);
  }
  for (bool forwards = false; !done[0]; forwards = !forwards) {
    for (unsigned i = 0; i < threads; ++i) {
      current = forwards ? i : threads - 1 - i;
      thread = {current % size.x, current / size.x};
      swapcontext(&scheduler, &contexts[current]);
    }
    for (unsigned i = 0; i < threads; ++i) FMK_CHECK(done[i] == done[0], "some threads of a block miss a barrier");
  }
}

}  // namespace fmk::cuda

#define threadIdx ::fmk::cuda::fibers.thread
#define blockDim ::fmk::cuda::fibers.size
#define blockIdx ::fmk::cuda::fibers.block

inline void __syncthreads() { ::fmk::cuda::fibers.barrier(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Every thread of the block must call it at once, as the kernels here do.
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned offset) {
  auto& fibers = ::fmk::cuda::fibers;
  const unsigned from = fibers.current % 32 + offset < 32 ? fibers.current + offset : fibers.current;
  static_assert(sizeof(T) <= sizeof(uint4));
  std::memcpy(&fibers.slots[fibers.current], &value, sizeof(T));
  fibers.barrier();
  T other;
  std::memcpy(&other, &fibers.slots[from], sizeof(T));
  fibers.barrier();
  return other;
}

namespace fmk::cuda {

inline void store16(uint4* p, uint4 x) { *p = x; }

template <class Arguments>
void emulate(void (*kernel)(Arguments), dim3 blocks, dim3 threads, const Arguments& arguments) {
  static void (*target)(Arguments);
  target = kernel;
  fibers.call = [](const void* argument) { target(*static_cast<const Arguments*>(argument)); };
  fibers.argument = &arguments;
  fibers.size = threads;
  for (unsigned i = 0; i < blocks.x; ++i) {
    fibers.block = {i};
    fibers.run_block();
  }
}

}  // namespace fmk::cuda

#define CUDA CPU  // the dispatch key that the .cu files name
