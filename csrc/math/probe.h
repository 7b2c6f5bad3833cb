// Probes z with E[z zᵀ] = I: 32 signs are one word, whose bit l is 1 where sign l is negative.
#pragma once

#include "permutation.h"

namespace fmk {

enum Probe { PROBE_RADEMACHER = 0, PROBE_NORMAL = 1, PROBE_HADAMARD = 2 };

constexpr int64_t SIGN_GROUP = 128;  // columns of one call of the generator: bit j mod 32 of word (j mod 128) / 32

FMK_HD uint32_t parity(uint32_t x) {  // popcount(x) mod 2
  x ^= x >> 16;
  x ^= x >> 8;
  x ^= x >> 4;
  x ^= x >> 2;
  x ^= x >> 1;
  return x & 1;
}

// Bits popcount(j & c) mod 2 of columns j = 32 word … 32 word + 31: signs of column c of a Hadamard matrix.
FMK_HD uint32_t hadamard_word(uint32_t c, uint32_t word) {
  uint32_t bits = 0u - parity(word & (c >> 5));
  bits ^= c & 1 ? 0xAAAAAAAAu : 0u;
  bits ^= c & 2 ? 0xCCCCCCCCu : 0u;
  bits ^= c & 4 ? 0xF0F0F0F0u : 0u;
  bits ^= c & 8 ? 0xFF00FF00u : 0u;
  bits ^= c & 16 ? 0xFFFF0000u : 0u;
  return bits;
}

// x under sign `lane` of a word.
FMK_HD float with_sign(float x, uint32_t word, int lane) {
  return bit_cast<float>(bit_cast<uint32_t>(x) ^ ((word >> lane) << 31));
}
FMK_HD double with_sign(double x, uint32_t word, int lane) {
  return bit_cast<double>(bit_cast<uint64_t>(x) ^ (uint64_t(word >> lane) << 63));
}

}  // namespace fmk
