// A keyed bijection on [0, n): the swap-or-not shuffle of Hoang, Morris and Rogaway (CRYPTO 2012).
//
// Round i pairs x with (K_i - x) mod n and moves to the partner where a hash of the pair's larger member says so. Any
// n, a fixed number of rounds, no data-dependent loop, no sort, no exchange between ranks.
#pragma once

#include "philox.h"

namespace fmk {

constexpr int PERMUTATION_ROUNDS = 24;

FMK_HD uint32_t hash32(uint32_t x) {  // the 32-bit finaliser of MurmurHash3
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// n < 2^31. Each call of the generator serves two rounds: one word picks K_i, the next keys the hash.
FMK_HD uint32_t permute(uint64_t seed, uint32_t n, uint32_t x) {
  for (int pair = 0; pair < PERMUTATION_ROUNDS / 2; ++pair) {
    const Words w = philox_row(seed, 0, pair, stream_word(STREAM_PERMUTATION, 0));
    for (int half = 0; half < 2; ++half) {
      const uint32_t pick = half == 0 ? w.w0 : w.w2, salt = half == 0 ? w.w1 : w.w3;
      const uint32_t k = uint32_t((uint64_t(pick) * n) >> 32);
      const uint32_t partner = k >= x ? k - x : k + n - x;
      const uint32_t larger = x > partner ? x : partner;
      x = (hash32(larger ^ salt) >> 31) ? partner : x;
    }
  }
  return x;
}

}  // namespace fmk
