// probe: [probes, rows, columns] of signs or normals from Philox counters.
#include "probe.h"

#include "stage.h"

namespace fmk {
namespace {

FMK_CLONES void in_order(uint32_t* __restrict out, const WordTile& tile, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    out[4 * g] = tile.w0[g], out[4 * g + 1] = tile.w1[g], out[4 * g + 2] = tile.w2[g], out[4 * g + 3] = tile.w3[g];
  }
}

// The same column of the Hadamard matrix on every row.
FMK_CLONES void flip_words(uint32_t* __restrict out, uint32_t column, uint32_t first, int64_t rows, int64_t words) {
  alignas(64) uint32_t flips[SIGN_WORDS];
  for (int64_t k = 0; k < words; ++k) flips[k] = hadamard_word(column, first + uint32_t(k));
  if (words == 4) {  // short rows: a loop over four words would not vectorise
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < 4; ++k) out[4 * r + k] ^= flips[k];
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < words; ++k) out[r * words + k] ^= flips[k];
    }
  }
}

// ±1 of a type as bits: those of 1 with the sign of each column.
template <class Bits>
FMK_INLINE void write_rows(Bits* __restrict out, const uint32_t* __restrict words, Bits one, int64_t rows,
                           int64_t columns) {
  constexpr int SIGN = 8 * sizeof(Bits) - 1;
  const auto signed_one = [&](uint32_t word, int64_t lane)
                              __attribute__((always_inline)) { return Bits(one | Bits(Bits(word >> lane) << SIGN)); };
  const int64_t per_row = words_per_row(columns);
  with_columns(rows, columns, [&]<int D>() __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; ++r) {
      if constexpr (D > 0) {
        for (int64_t j = 0; j < D; ++j) out[r * D + j] = signed_one(words[r * 4], j);
      } else {
        const uint32_t* word = words + r * per_row;
        int64_t left = columns;
        for (; left >= 32; left -= 32, out += 32, ++word) {
          for (int64_t l = 0; l < 32; ++l) out[l] = signed_one(*word, l);
        }
        for (int64_t l = 0; l < left; ++l) out[l] = signed_one(*word, l);
        out += left;
      }
    }
  });
}

FMK_CLONES void write(uint16_t* out, const uint32_t* words, uint16_t one, int64_t rows, int64_t columns) {
  write_rows(out, words, one, rows, columns);
}
FMK_CLONES void write(uint32_t* out, const uint32_t* words, uint32_t one, int64_t rows, int64_t columns) {
  write_rows(out, words, one, rows, columns);
}
FMK_CLONES void write(uint64_t* out, const uint32_t* words, uint64_t one, int64_t rows, int64_t columns) {
  write_rows(out, words, one, rows, columns);
}

template <class C>
void draw_normals(const Probes& p, int64_t probe, const Block& task, void* out, ScalarType type) {
  for_tiles(task, [&](const Block& tile) {
    alignas(64) C values[TILE];
    normals(values, p.seed, p.first_row, tile, p.stream(probe), scalar_type_of<C>);
    store(out, type, (probe * p.rows + tile.row) * p.columns + tile.column, values, tile.rows * tile.count);
  });
}

template <class T>
void draw_signs(const Probes& p, int64_t probe, const Block& task, T* out) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  for_sign_tiles(task, [&](const Block& tile) {
    alignas(64) uint32_t words[SIGN_WORDS];
    sign_words(words, p, probe, tile);
    T* at = out + (probe * p.rows + tile.row) * p.columns + tile.column;
    write(reinterpret_cast<Bits*>(at), words, bit_cast<Bits>(from_float<T>(1.0f)), tile.rows, tile.count);
  });
}

Tensor probe(const Tensor& key, int64_t rows, int64_t columns, int64_t distribution, int64_t count, int64_t first,
             int64_t first_row, ScalarType type) {
  const int64_t sizes[] = {count, rows, columns};
  Tensor out = empty_as(key, Sizes(sizes, 3), type);
  const Probes p(key, distribution, count, first, rows, columns, first_row);
  void* result = out.mutable_data_ptr();
  for_probes(p, Cut(rows, columns, TASK), [&](int64_t probe, const Block& task, int64_t) {
    if (p.signs()) {
      dispatch(type, [&]<class T>() { draw_signs(p, probe, task, static_cast<T*>(result)); });
    } else if (type == ScalarType::Double) {
      draw_normals<double>(p, probe, task, result, type);
    } else {
      draw_normals<float>(p, probe, task, result, type);
    }
  });
  return out;
}

}  // namespace

Probes::Probes(const Tensor& key, int64_t distribution, int64_t count, int64_t first, int64_t rows, int64_t columns,
               int64_t first_row)
    : seed(uint64_t(*data<const int64_t>(key))),
      distribution(distribution),
      count(count),
      first(first),
      rows(rows),
      columns(columns),
      first_row(first_row) {
  if (distribution != PROBE_HADAMARD) return;
  uint32_t order = 1;
  while (order < columns) order *= 2;
  FMK_CHECK(first + count <= order, "more probes than columns of the Hadamard matrix");
  for (int64_t i = 0; i < count; ++i) picked.push_back(permute(seed, order, uint32_t(first + i)));
}

void sign_words(uint32_t* out, const Probes& p, int64_t probe, const Block& tile) {
  const bool hadamard = p.distribution == PROBE_HADAMARD;
  const int64_t per_row = words_per_row(tile.count);
  WordTile drawn;
  words(drawn, p.seed, uint64_t(p.first_row + tile.row), tile.rows, uint32_t(tile.column / SIGN_GROUP), per_row / 4,
        hadamard ? stream_word(STREAM_PROBE, 0) : p.stream(probe));
  in_order(out, drawn, tile.rows * per_row / 4);
  if (hadamard) flip_words(out, p.picked[probe], uint32_t(tile.column / 32), tile.rows, per_row);
}

}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("probe", TORCH_BOX(&fmk::probe)); }
