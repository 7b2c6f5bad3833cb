// How a [rows, columns] tensor is cut into work on the CPU. The cut depends on the shape alone, so sums are taken in
// the same order whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
// One copy of a loop for AVX-512, one for AVX2 with FMA, one for any x86-64; the loader picks.
#define FMK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FMK_CLONES
#endif

namespace fmk {

constexpr int64_t TILE = 1024;       // elements worked on at once: a handful of such buffers stays in the first cache
constexpr int64_t TASK = 16 * TILE;  // elements handed to a thread at once

#define FMK_INLINE inline __attribute__((always_inline))

// Calls f<columns>() with the number of columns as a constant where rows are so short that the loop over a row's
// elements must be unrolled and the one over rows vectorised; f<0>() for any other number.
template <class F>
FMK_INLINE void with_columns(int64_t rows, int64_t columns, F&& f) {
  switch (rows > 1 ? columns : 0) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
  }
  f.template operator()<0>();
}

// A task is a part of one long row or several whole short rows; a tile is the same on a smaller scale.
struct Block {
  int64_t row, rows;      // rows [row, row + rows)
  int64_t column, count;  // columns [column, column + count), all of them where rows > 1
  bool first() const { return column == 0; }
};

struct Cut {
  int64_t rows, columns, rows_per_block, spans, span;

  Cut(int64_t rows, int64_t columns, int64_t elements) : rows(rows), columns(columns) {
    const int64_t padded = std::max<int64_t>(1, (columns + 3) / 4) * 4;  // a row takes at least one group
    rows_per_block = std::max<int64_t>(1, elements / std::max<int64_t>(padded, 1));
    spans = std::max<int64_t>(1, (padded + elements - 1) / elements);
    span = spans > 1 ? elements : columns;
  }
  int64_t blocks() const { return (rows + rows_per_block - 1) / rows_per_block * spans; }
  Block block(int64_t i) const {
    const int64_t row = i / spans * rows_per_block, column = i % spans * span;
    return {row, std::min(rows_per_block, rows - row), column, std::min(span, columns - column)};
  }
};

// Calls f(tile) for the tiles of a task, in order.
template <class F>
void for_tiles(const Block& task, F&& f) {
  const Cut cut(task.rows, task.count, TILE);
  for (int64_t i = 0; i < cut.blocks(); ++i) {
    Block tile = cut.block(i);
    tile.row += task.row;
    tile.column += task.column;
    f(tile);
  }
}

}  // namespace fmk
