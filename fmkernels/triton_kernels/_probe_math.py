"""The formulas of csrc/math/probe.h in Triton, under the same names."""

import triton
import triton.language as tl

from ..ops.noise import STREAMS
from ..ops.probe import GROUP, PROBES
from ._math import interleave, philox_row

NORMAL = tl.constexpr(PROBES["normal"])
HADAMARD = tl.constexpr(PROBES["hadamard"])
STREAM_PROBE = tl.constexpr(STREAMS["probe"])
SIGN_GROUP = tl.constexpr(GROUP)


@triton.jit
def parity(x):
    """popcount(x) mod 2 of uint32."""
    x ^= x >> 16
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return x & 1


@triton.jit
def hadamard_word(c, word):
    """Bits popcount(j & c) mod 2 of columns j = 32·word … 32·word + 31; all are uint32."""
    bits = parity(word & (c >> 5)) * 0xFFFFFFFF
    bits ^= (c & 1) * 0xAAAAAAAA
    bits ^= ((c >> 1) & 1) * 0xCCCCCCCC
    bits ^= ((c >> 2) & 1) * 0xF0F0F0F0
    bits ^= ((c >> 3) & 1) * 0xFF00FF00
    return bits ^ ((c >> 4) & 1) * 0xFFFF0000


@triton.jit
def with_sign(x, word, lane):
    """x, fp32 or fp64, under sign ``lane`` of a word."""
    sign = word >> lane
    if x.dtype == tl.float64:
        return (x.to(tl.uint64, bitcast=True) ^ (sign.to(tl.uint64) << 63)).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.uint32, bitcast=True) ^ (sign << 31)).to(tl.float32, bitcast=True)


@triton.jit
def sign_words(seed, row, start, stream, c, DISTRIBUTION: tl.constexpr, WORDS: tl.constexpr):
    """Sign words [R, WORDS] of rows [R] from column ``start`` on: 1, 2, or whole groups of 4. A counter's stream word
    and the Hadamard column are those of a probe, uint32."""
    GROUPS: tl.constexpr = (WORDS + 3) // 4
    group = start // SIGN_GROUP + tl.arange(0, GROUPS)
    w0, w1, w2, w3 = philox_row(seed, row[:, None], group[None, :], stream)
    if WORDS == 1:
        words = w0
    elif WORDS == 2:
        words = tl.reshape(tl.join(w0, w1), [row.shape[0], 2])
    else:  # not by selecting: each thread would then draw for itself what the whole tile shares
        words = interleave(w0, w1, w2, w3)
    if DISTRIBUTION == HADAMARD:
        words ^= hadamard_word(c, (start // 32 + tl.arange(0, WORDS)).to(tl.uint32))[None, :]
    return words
