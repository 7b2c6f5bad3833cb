// noise: [rows, columns] of normals or uniforms from Philox counters.
#include "noise.h"

#include "math/normal.h"
#include "stage.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 header sets it off
#endif

namespace fmk {
namespace {

void philox_scalar(WordTile& tile, int64_t first, int64_t count, uint64_t seed, uint32_t stream) {
  for (int64_t i = first; i < count; ++i) {
    const Words counter{tile.group[i], tile.row_low[i], tile.row_high[i], stream};
    const Words w = philox(counter, uint32_t(seed), uint32_t(seed >> 32));
    tile.w0[i] = w.w0, tile.w1[i] = w.w1, tile.w2[i] = w.w2, tile.w3[i] = w.w3;
  }
}

#if defined(__x86_64__)

// Compilers turn the high half of a 32 x 32 bit product into shuffles; here a 64-bit lane holds one counter word, whose
// upper half may hold anything, since the multiplication reads the lower half only. Several vectors in flight hide its
// latency. Returns how many groups were done, a multiple of the vectors' width.
#define FMK_PHILOX(name, isa, V, LANES, WIDEN, SET, MUL, SHIFT, XOR, NARROW)                                 \
  __attribute__((target(isa))) int64_t name(WordTile& tile, int64_t count, uint64_t seed, uint32_t stream) { \
    constexpr int64_t FLIGHT = 4, STEP = FLIGHT * LANES;                                                     \
    const V m0 = SET(PHILOX_M0), m1 = SET(PHILOX_M1);                                                        \
    int64_t i = 0;                                                                                           \
    for (; i + STEP <= count; i += STEP) {                                                                   \
      V c0[FLIGHT], c1[FLIGHT], c2[FLIGHT], c3[FLIGHT];                                                      \
      for (int v = 0; v < FLIGHT; ++v) {                                                                     \
        c0[v] = WIDEN(tile.group + i + v * LANES);                                                           \
        c1[v] = WIDEN(tile.row_low + i + v * LANES);                                                         \
        c2[v] = WIDEN(tile.row_high + i + v * LANES);                                                        \
        c3[v] = SET(stream);                                                                                 \
      }                                                                                                      \
      uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);                                               \
      _Pragma("GCC unroll 10") for (int round = 0; round < PHILOX_ROUNDS; ++round) {                         \
        const V key0 = SET(k0), key1 = SET(k1);                                                              \
        for (int v = 0; v < FLIGHT; ++v) {                                                                   \
          const V p0 = MUL(c0[v], m0), p1 = MUL(c2[v], m1);                                                  \
          c0[v] = XOR(XOR(SHIFT(p1, 32), c1[v]), key0);                                                      \
          c2[v] = XOR(XOR(SHIFT(p0, 32), c3[v]), key1);                                                      \
          c1[v] = p1;                                                                                        \
          c3[v] = p0;                                                                                        \
        }                                                                                                    \
        k0 += PHILOX_W0;                                                                                     \
        k1 += PHILOX_W1;                                                                                     \
      }                                                                                                      \
      for (int v = 0; v < FLIGHT; ++v) {                                                                     \
        NARROW(tile.w0 + i + v * LANES, c0[v]);                                                              \
        NARROW(tile.w1 + i + v * LANES, c1[v]);                                                              \
        NARROW(tile.w2 + i + v * LANES, c2[v]);                                                              \
        NARROW(tile.w3 + i + v * LANES, c3[v]);                                                              \
      }                                                                                                      \
    }                                                                                                        \
    return i;                                                                                                \
  }

#define FMK_WIDEN4(p) _mm256_cvtepu32_epi64(_mm_load_si128(reinterpret_cast<const __m128i*>(p)))
#define FMK_WIDEN8(p) _mm512_cvtepu32_epi64(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)))
#define FMK_NARROW4(p, v)                        \
  _mm_store_si128(reinterpret_cast<__m128i*>(p), \
                  _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6))))
#define FMK_NARROW8(p, v) _mm256_store_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(v))

FMK_PHILOX(philox_avx2, "avx2", __m256i, 4, FMK_WIDEN4, _mm256_set1_epi64x, _mm256_mul_epu32, _mm256_srli_epi64,
           _mm256_xor_si256, FMK_NARROW4)
FMK_PHILOX(philox_avx512, "avx512f", __m512i, 8, FMK_WIDEN8, _mm512_set1_epi64, _mm512_mul_epu32, _mm512_srli_epi64,
           _mm512_xor_si512, FMK_NARROW8)

void philox_tile(WordTile& tile, int64_t count, uint64_t seed, uint32_t stream) {
  static const bool avx512 = __builtin_cpu_supports("avx512f"), avx2 = __builtin_cpu_supports("avx2");
  int64_t done = 0;
  if (avx512) {
    done = philox_avx512(tile, count, seed, stream);
  } else if (avx2) {
    done = philox_avx2(tile, count, seed, stream);
  }
  philox_scalar(tile, done, count, seed, stream);
}

#else

void philox_tile(WordTile& tile, int64_t count, uint64_t seed, uint32_t stream) {
  philox_scalar(tile, 0, count, seed, stream);
}

#endif

FMK_CLONES void normals_loop(float* __restrict out, const WordTile& tile, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    normal_pair(tile.w0[i], tile.w1[i], out[4 * i], out[4 * i + 1]);
    normal_pair(tile.w2[i], tile.w3[i], out[4 * i + 2], out[4 * i + 3]);
  }
}

void normals_loop(double* out, const WordTile& tile, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    normal_pair(tile.w0[i], tile.w1[i], out[4 * i], out[4 * i + 1]);
    normal_pair(tile.w2[i], tile.w3[i], out[4 * i + 2], out[4 * i + 3]);
  }
}

FMK_CLONES void short_row_counters(WordTile& tile, uint64_t row, uint32_t group, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    tile.group[r] = group;
    tile.row_low[r] = uint32_t(row + uint64_t(r));
    tile.row_high[r] = uint32_t((row + uint64_t(r)) >> 32);
  }
}

FMK_CLONES void long_row_counters(WordTile& tile, uint64_t row, uint32_t group, int64_t at, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    tile.group[at + g] = group + uint32_t(g);
    tile.row_low[at + g] = uint32_t(row);
    tile.row_high[at + g] = uint32_t(row >> 32);
  }
}

// The words of a tile of columns; returns the number of groups.
int64_t words(WordTile& tile, uint64_t seed, int64_t first_row, const Block& block, uint32_t stream) {
  const int64_t per_row = padded(block.count) / 4;
  words(tile, seed, uint64_t(first_row + block.row), block.rows, uint32_t(block.column / 4), per_row, stream);
  return block.rows * per_row;
}

// Drop the padding between rows, in place.
template <class C>
void compact(C* out, const Block& block) {
  const int64_t stride = padded(block.count);
  if (stride == block.count) return;
  with_columns(block.rows, block.count, [&]<int D>() __attribute__((always_inline)) {
    const int64_t count = D ? D : block.count, step = D ? 4 : stride;
    for (int64_t r = 1; r < block.rows; ++r) {
      for (int64_t j = 0; j < count; ++j) out[r * count + j] = out[r * step + j];
    }
  });
}

}  // namespace

void words(WordTile& tile, uint64_t seed, uint64_t row, int64_t rows, uint32_t group, int64_t groups, uint32_t stream) {
  if (groups == 1) {
    short_row_counters(tile, row, group, rows);
  } else {
    for (int64_t r = 0; r < rows; ++r) long_row_counters(tile, row + uint64_t(r), group, r * groups, groups);
  }
  philox_tile(tile, rows * groups, seed, stream);
}

template <class C>
void normals(C* out, uint64_t seed, int64_t first_row, const Block& block, uint32_t stream, ScalarType type) {
  WordTile tile;
  normals_loop(out, tile, words(tile, seed, first_row, block, stream));
  compact(out, block);
  round_through(type, out, block.rows * block.count);
}
template void normals(float*, uint64_t, int64_t, const Block&, uint32_t, ScalarType);
template void normals(double*, uint64_t, int64_t, const Block&, uint32_t, ScalarType);

void uniforms(double* out, uint64_t seed, int64_t first_row, const Block& block, uint32_t stream) {
  WordTile tile;
  const int64_t groups = words(tile, seed, first_row, block, stream);
  for (int64_t i = 0; i < groups; ++i) {
    out[4 * i] = uniform(tile.w0[i]), out[4 * i + 1] = uniform(tile.w1[i]);
    out[4 * i + 2] = uniform(tile.w2[i]), out[4 * i + 3] = uniform(tile.w3[i]);
  }
  compact(out, block);
}

void time_uniforms(double* out, uint64_t seed, int64_t first_row, int64_t row, int64_t rows) {
  WordTile tile;
  words(tile, seed, first_row, {row, rows, 0, 1}, stream_word(STREAM_TIME, 0));
  for (int64_t i = 0; i < rows; ++i) out[i] = uniform(tile.w0[i]);
}

namespace {

constexpr int64_t NORMAL = 0;

Tensor noise(const Tensor& key, int64_t rows, int64_t columns, int64_t first_row, int64_t stream, int64_t index,
             int64_t distribution, ScalarType type) {
  const int64_t sizes[] = {rows, columns};
  Tensor out = empty_as(key, Sizes(sizes, 2), type);
  const uint64_t seed = uint64_t(*data<const int64_t>(key));
  const uint32_t word = stream_word(stream, index);
  void* result = out.mutable_data_ptr();
  const auto write = [&](const Block& tile, const auto* values) {
    store(result, type, tile.row * columns + tile.column, values, tile.rows * tile.count);
  };
  const Cut cut(rows, columns, TASK);
  parallel_for(0, columns > 0 ? cut.blocks() : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for_tiles(cut.block(i), [&](const Block& tile) {
        if (distribution != NORMAL || type == ScalarType::Double) {
          double values[TILE];
          if (distribution == NORMAL) {
            normals(values, seed, first_row, tile, word, type);
          } else {
            uniforms(values, seed, first_row, tile, word);
          }
          write(tile, values);
        } else {
          alignas(64) float values[TILE];
          normals(values, seed, first_row, tile, word, ScalarType::Float);
          write(tile, values);
        }
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace fmk

STABLE_TORCH_LIBRARY_IMPL(fmkernels, CPU, m) { m.impl("noise", TORCH_BOX(&fmk::noise)); }
