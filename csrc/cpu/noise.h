// Random words and normals of a tile, shared by the kernels that draw.
#pragma once

#include "math/philox.h"
#include "tile.h"
#include "torch/tensor.h"

namespace fmk {

constexpr int64_t GROUPS = TILE / 4;

// Counters and words of a tile, a structure of arrays: the loops over groups vectorise.
struct WordTile {
  alignas(64) uint32_t group[GROUPS], row_low[GROUPS], row_high[GROUPS];
  alignas(64) uint32_t w0[GROUPS], w1[GROUPS], w2[GROUPS], w3[GROUPS];
};

// The words of `groups` groups from `group` on of each of `rows` global rows, one row after the other; at most GROUPS.
void words(WordTile& tile, uint64_t seed, uint64_t row, int64_t rows, uint32_t group, int64_t groups, uint32_t stream);

// Columns a row takes while noise is drawn: whole groups of four.
inline int64_t padded(int64_t columns) { return (columns + 3) / 4 * 4; }

// Standard normals of a tile, out[row][column], in C and rounded to `type`; `out` has room for TILE elements, which is
// what the tile may take with its rows padded. `first_row` is the global number of row 0; tile.column is a multiple
// of 4.
template <class C>
void normals(C* out, uint64_t seed, int64_t first_row, const Block& tile, uint32_t stream, ScalarType type);

// (w + 1/2) 2^-32 of the same words.
void uniforms(double* out, uint64_t seed, int64_t first_row, const Block& tile, uint32_t stream);

// The same of the rows' times: out[row] from the first word of each.
void time_uniforms(double* out, uint64_t seed, int64_t first_row, int64_t row, int64_t rows);

}  // namespace fmk
