// How probes are cut into tasks, and the sign words of a task: shared by probe and probe_dot.
#pragma once

#include <vector>

#include "math/probe.h"
#include "noise.h"

namespace fmk {

struct Probes {
  uint64_t seed;
  int64_t distribution, count, first, rows, columns, first_row;
  std::vector<uint32_t> picked;  // columns of the Hadamard matrix, one a probe

  Probes(const Tensor& key, int64_t distribution, int64_t count, int64_t first, int64_t rows, int64_t columns,
         int64_t first_row);
  bool signs() const { return distribution != PROBE_NORMAL; }
  uint32_t stream(int64_t probe) const { return stream_word(STREAM_PROBE, first + probe); }
};

constexpr int64_t SIGN_WORDS = 4 * GROUPS;

// Words the rows of a tile of signs take, one after the other: whole groups.
inline int64_t words_per_row(int64_t columns) { return (columns + SIGN_GROUP - 1) / SIGN_GROUP * 4; }

// Sign words of a tile, out[row][word]; room for SIGN_WORDS. tile.column is a multiple of SIGN_GROUP.
void sign_words(uint32_t* out, const Probes& probes, int64_t probe, const Block& tile);

// Calls f(tile) for parts of a task whose words fit.
template <class F>
void for_sign_tiles(const Block& task, F&& f) {
  const int64_t rows = std::max<int64_t>(1, SIGN_WORDS / words_per_row(task.count));
  for (int64_t r = 0; r < task.rows; r += rows) {
    f(Block{task.row + r, std::min(rows, task.rows - r), task.column, task.count});
  }
}

// Calls f(probe, task, i) for every task of every probe, the i-th of the cut, on torch's threads.
template <class F>
void for_probes(const Probes& p, const Cut& cut, F&& f) {
  const int64_t blocks = p.rows > 0 && p.columns > 0 ? cut.blocks() : 0;
  const int64_t each = std::max<int64_t>(1, p.rows * p.columns / std::max<int64_t>(1, blocks));
  parallel_for(0, p.count * blocks, std::max<int64_t>(1, TASK / each), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / blocks, cut.block(i % blocks), i % blocks);
  });
}

}  // namespace fmk
