// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// Every random number of the library is one word of philox(counter, key) with
//   counter = (column / 4, row mod 2^32, row / 2^32, stream | index << 8)      key = the two halves of the seed
// so it depends on nothing but the seed, the global row, the column, the stream and the index.
#pragma once

#include "macros.h"

namespace fmk {

enum Stream : uint32_t {
  STREAM_X0 = 0,
  STREAM_BRIDGE = 1,
  STREAM_TIME = 2,
  STREAM_PROBE = 3,
  STREAM_DEQUANTISATION = 4,
  STREAM_BASE = 5,
  STREAM_PERMUTATION = 6,
};

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

struct Words {
  uint32_t w0, w1, w2, w3;
};

FMK_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);  // nvcc adds an instruction for the shift below
#else
  return uint32_t((uint64_t(a) * b) >> 32);
#endif
}

FMK_HD Words philox(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    c = Words{multiply_high(PHILOX_M1, c.w2) ^ c.w1 ^ k0, PHILOX_M1 * c.w2, multiply_high(PHILOX_M0, c.w0) ^ c.w3 ^ k1,
              PHILOX_M0 * c.w0};
    k0 += PHILOX_W0;
    k1 += PHILOX_W1;
  }
  return c;
}

FMK_HD uint32_t stream_word(int64_t stream, int64_t index) { return uint32_t(stream) | (uint32_t(index) << 8); }

// The four words of columns 4·group … 4·group + 3 of a row.
FMK_HD Words philox_row(uint64_t seed, int64_t row, int64_t group, uint32_t stream) {
  const uint64_t r = uint64_t(row);
  return philox(Words{uint32_t(group), uint32_t(r), uint32_t(r >> 32), stream}, uint32_t(seed), uint32_t(seed >> 32));
}

// (w + 1/2) 2^-32, strictly inside (0, 1) in double precision.
FMK_HD double uniform(uint32_t w) { return (double(w) + 0.5) * 0x1p-32; }

}  // namespace fmk
