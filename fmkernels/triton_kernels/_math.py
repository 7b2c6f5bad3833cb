"""The formulas of csrc/math in Triton, under the same names.

Codes (schedule, sampler, prediction, compare, weight, rho) are ``tl.constexpr``. A formula computes in the dtype of its
tensor argument; parameters come as tensors of that dtype. libdevice does not run under the interpreter, so what Triton
itself lacks (expm1, powers) is written out here.
"""

import math

import triton
import triton.language as tl

from ..objectives import COMPARES, PREDICTIONS, RHOS, SIGMA_FLOOR, WEIGHTS
from ..ops import runge_kutta_step as step_op
from ..ops.noise import PERMUTATION_ROUNDS, STREAMS
from ..schedules import (
    VE,
    VP,
    CondOT,
    ConstantNoise,
    Cosine,
    LinearVP,
    Polynomial,
    SchrodingerBridge,
    SubVP,
)
from ..timesteps import Beta, CosMap, LogitNormal, Mode, Uniform

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PI = tl.constexpr(math.pi)

STREAM_X0 = tl.constexpr(STREAMS["x0"])
STREAM_BRIDGE = tl.constexpr(STREAMS["bridge"])
STREAM_TIME = tl.constexpr(STREAMS["time"])
STREAM_PERMUTATION = tl.constexpr(STREAMS["permutation"])
ROUND_PAIRS = tl.constexpr(PERMUTATION_ROUNDS // 2)

COND_OT = tl.constexpr(CondOT.code)
VARIANCE_PRESERVING = tl.constexpr(VP.code)
VARIANCE_EXPLODING = tl.constexpr(VE.code)
COSINE = tl.constexpr(Cosine.code)
LINEAR_VP = tl.constexpr(LinearVP.code)
SUB_VP = tl.constexpr(SubVP.code)
POLYNOMIAL = tl.constexpr(Polynomial.code)
CONSTANT_NOISE = tl.constexpr(ConstantNoise.code)
SCHRODINGER_BRIDGE = tl.constexpr(SchrodingerBridge.code)

UNIFORM = tl.constexpr(Uniform.code)
LOGIT_NORMAL = tl.constexpr(LogitNormal.code)
MODE = tl.constexpr(Mode.code)
COS_MAP = tl.constexpr(CosMap.code)
BETA = tl.constexpr(Beta.code)

PREDICT_VELOCITY = tl.constexpr(PREDICTIONS["velocity"])
PREDICT_NOISE = tl.constexpr(PREDICTIONS["noise"])
PREDICT_DATA = tl.constexpr(PREDICTIONS["data"])
PREDICT_SCORE = tl.constexpr(PREDICTIONS["score"])
PREDICT_EDM = tl.constexpr(PREDICTIONS["edm"])
COMPARE_VELOCITY = tl.constexpr(COMPARES["velocity"])
WEIGHT_MIN_SNR = tl.constexpr(WEIGHTS["min_snr"])
WEIGHT_SIGMA_SQRT = tl.constexpr(WEIGHTS["sigma_sqrt"])
WEIGHT_COS_MAP = tl.constexpr(WEIGHTS["cosmap"])
WEIGHT_LIKELIHOOD = tl.constexpr(WEIGHTS["likelihood"])
FLOOR = tl.constexpr(SIGMA_FLOOR)
TINY = tl.constexpr(1e-20)  # keeps EDM's logarithm finite at both ends

RHO_ABSOLUTE = tl.constexpr(RHOS["absolute"])
RHO_PSEUDO_HUBER = tl.constexpr(RHOS["pseudo_huber"])


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A number as a tensor: compiled kernels see an fp64 argument, the interpreter a Python float."""
    return tl.full([], value, DTYPE)


# ---- half.h -------------------------------------------------------------------------------------------------------


@triton.jit
def from_float(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest, ties to even; half precision is reached through fp32."""
    if DTYPE == tl.float32 or DTYPE == tl.float64:
        return x.to(DTYPE)
    elif DTYPE == tl.bfloat16 and INTERPRETED:  # the interpreter's own conversion truncates
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(nan, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.float32).to(DTYPE)


# ---- philox.h -----------------------------------------------------------------------------------------------------


@triton.jit
def philox_row(seed, row, group, word):
    """The four words of columns 4·group … 4·group + 3 of a row (int64), as uint32; ``row`` and ``group`` broadcast."""
    return tl.philox(seed, group.to(tl.uint32), row.to(tl.uint32), (row >> 32).to(tl.uint32), word.to(tl.uint32))


@triton.jit
def uniform(w):
    """(w + ½)·2⁻³², strictly inside (0, 1) in fp64."""
    return (w.to(tl.float64) + 0.5) * 2.0**-32


# ---- normal.h -----------------------------------------------------------------------------------------------------


@triton.jit
def log_uniform(m, DTYPE: tl.constexpr):
    """ln of (m + ½)·2⁻³¹ for a 31-bit int32 m; near 1 from the signed distance to 1, which m holds exactly."""
    if DTYPE == tl.float64:
        return tl.log((m.to(tl.float64) + 0.5) * 2.0**-31)  # the argument is exact
    else:
        u = (m.to(tl.float32) + 0.5) * 2.0**-31
        distance = -((0x7FFFFFFF - m).to(tl.float32) + 0.5) * 2.0**-31
        bits = u.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        f = tl.where(exponent == 0, distance, mantissa - 1.0)
        q = f * 8.722355020e-02 - 1.436684280e-01
        q = q * f + 1.495226676e-01
        q = q * f - 1.656239311e-01
        q = q * f + 1.995683355e-01
        q = q * f - 2.500207407e-01
        q = q * f + 3.333418563e-01
        q = q * f - 4.999998796e-01
        q = q * f + 9.999999742e-01
        return exponent.to(tl.float32) * 6.931471806e-01 + q * f


@triton.jit
def sin_pi(x):
    """sin πx for |x| ≤ ½: absolute error 2e-8 in fp32; in fp64 Taylor's series, whose next term is below 1e-18."""
    if x.dtype == tl.float64:
        y = x * PI
        s = y * y
        q = 1.0 - s * (1.0 / 506)
        for i in tl.static_range(10):
            q = 1.0 - q * s * (1.0 / ((20 - 2 * i) * (21 - 2 * i)))
        return q * y
    else:
        s = x * x
        q = s * 7.765940831e-02 - 5.982921595e-01
        q = q * s + 2.550077660e00
        q = q * s - 5.167710090e00
        q = q * s + 3.141592640e00
        return q * x


@triton.jit
def cos_pi(x):
    """cos πx for |x| ≤ ½, as :func:`sin_pi`."""
    if x.dtype == tl.float64:
        y = x * PI
        s = y * y
        q = 1.0 - s * (1.0 / 552)
        for i in tl.static_range(11):
            q = 1.0 - q * s * (1.0 / ((21 - 2 * i) * (22 - 2 * i)))
        return q
    else:
        s = x * x
        q = s * -2.439671660e-02 + 2.349375589e-01
        q = q * s - 1.335212057e00
        q = q * s + 4.058709164e00
        q = q * s - 4.934802137e00
        return q * s + 1.0


@triton.jit
def normal_pair(w0, w1, DTYPE: tl.constexpr):
    """Two standard normals from two words; the cosine's sign is the low bit of w0."""
    radius = tl.sqrt(-2.0 * log_uniform((w0 >> 1).to(tl.int32), DTYPE))
    turn = w1.to(tl.int32, bitcast=True).to(DTYPE) * 2.0**-32
    cosine = radius * cos_pi(turn)
    return tl.where((w0 & 1) == 0, cosine, -cosine), radius * sin_pi(turn)


@triton.jit
def interleave(n0, n1, n2, n3):
    """Four tensors [R, G] as one [R, 4G] whose columns 4g … 4g + 3 they are."""
    joined = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(joined, [n0.shape[0], 4 * n0.shape[1]])


@triton.jit
def normals(seed, row, group, word, DTYPE: tl.constexpr):
    """Standard normals [R, 4G] of rows [R] and column groups [G], computed in fp32 or fp64 and rounded to DTYPE."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    w0, w1, w2, w3 = philox_row(seed, row[:, None], group[None, :], word)
    n0, n1 = normal_pair(w0, w1, COMPUTE)
    n2, n3 = normal_pair(w2, w3, COMPUTE)
    return from_float(interleave(n0, n1, n2, n3), DTYPE)


# ---- schedule.h ---------------------------------------------------------------------------------------------------


@triton.jit
def expm1(x):
    """eˣ − 1: Taylor's series where the difference would cancel."""
    series = 1.0 + x * (1.0 / 16)
    for i in tl.static_range(14):
        series = 1.0 + series * x * (1.0 / (15 - i))
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def log_power(x, n):
    """ln xⁿ for x ≥ 0 in fp64, whose rounding an exponential does not carry into fp32 results; 0 for n = 0."""
    return tl.where(n == 0.0, 0.0, n.to(tl.float64) * tl.log(x.to(tl.float64)))


@triton.jit
def schedule_coefficients(SCHEDULE: tl.constexpr, s0, s1, t):
    """(α, σ, γ, α', σ', γ') at t; s0 and s1 are the schedule's parameters in t's dtype."""
    s = 1.0 - t
    zero = tl.zeros_like(t)
    one = zero + 1.0
    gamma, d_gamma = zero, zero
    if SCHEDULE == COND_OT:
        alpha, d_alpha = t, one
        sigma, d_sigma = 1.0 - (1.0 - s0) * t, s0 - one
    elif SCHEDULE == VARIANCE_PRESERVING or SCHEDULE == SUB_VP:
        integral = s * s0 + 0.5 * s * s * (s1 - s0)
        beta = s0 + s * (s1 - s0)
        alpha = tl.exp(-0.5 * integral)
        d_alpha = 0.5 * beta * alpha
        sigma = -expm1(-integral)
        d_sigma = -beta * alpha * alpha
        if SCHEDULE == VARIANCE_PRESERVING:
            sigma = tl.sqrt(sigma)
            d_sigma = 0.5 * d_sigma / sigma
    elif SCHEDULE == VARIANCE_EXPLODING:
        log_ratio = tl.log(s1 / s0)
        alpha, d_alpha = one, zero
        sigma = s0 * tl.exp(s * log_ratio)
        d_sigma = -log_ratio * sigma
    elif SCHEDULE == COSINE:
        alpha, sigma = sin_pi(0.5 * t), sin_pi(0.5 * s)
        d_alpha, d_sigma = sigma * (0.5 * PI), alpha * (-0.5 * PI)
    elif SCHEDULE == LINEAR_VP:
        alpha, d_alpha = t, one
        sigma = tl.sqrt(s * (1.0 + t))
        d_sigma = -t / sigma
    elif SCHEDULE == POLYNOMIAL:
        exponent = log_power(t, s0)
        alpha, sigma = tl.exp(exponent).to(t.dtype), -expm1(exponent).to(t.dtype)
        d_alpha = s0 * tl.exp(log_power(t, s0 - 1.0)).to(t.dtype)
        d_sigma = -d_alpha
    else:
        tl.static_assert(SCHEDULE == CONSTANT_NOISE or SCHEDULE == SCHRODINGER_BRIDGE)
        alpha, d_alpha = t, one
        sigma, d_sigma = s, -one
        if SCHEDULE == CONSTANT_NOISE:
            gamma = zero + s0
        else:
            root = tl.sqrt(t * s)
            gamma = s0 * root
            inside = root > 0.0
            d_gamma = tl.where(inside, s0 * (1.0 - 2.0 * t) / (2.0 * tl.where(inside, root, 1.0)), 0.0)
    return alpha, sigma, gamma, d_alpha, d_sigma, d_gamma


# ---- objective.h --------------------------------------------------------------------------------------------------


@triton.jit
def objective_weight(WEIGHT: tl.constexpr, k, PREDICTION: tl.constexpr, alpha, sigma, d_alpha, d_sigma):
    floor = scalar(FLOOR, sigma.dtype)
    floored = tl.where(sigma > floor, sigma, floor)
    w = d_alpha * sigma - alpha * d_sigma
    weight = tl.zeros_like(sigma) + 1.0
    if WEIGHT == WEIGHT_MIN_SNR:
        snr = alpha * alpha / (floored * floored)
        if PREDICTION == PREDICT_NOISE:
            weight = tl.where(snr < k, 1.0, k / snr)
        else:
            weight = tl.where(snr < k, snr, k)
            if PREDICTION != PREDICT_DATA:
                divisor = tl.where(alpha == 0.0, 1.0, w)  # where α = 0, W may be 0 too, and the weight is 0
                weight = weight * sigma * sigma / (divisor * divisor)
    elif WEIGHT == WEIGHT_SIGMA_SQRT:
        weight = 1.0 / (floored * floored)
    elif WEIGHT == WEIGHT_COS_MAP:
        weight = 2.0 / ((1.0 - 2.0 * sigma + 2.0 * sigma * sigma) * PI)
    elif WEIGHT == WEIGHT_LIKELIHOOD:
        weight = 2.0 * w / (alpha * floored)
    return weight


@triton.jit
def objective_row(PREDICTION: tl.constexpr, COMPARE: tl.constexpr, o0, t, alpha, sigma, d_alpha, d_sigma, d_gamma):
    """(p, a, b, c, network time) and the scale of x_t; o0 is the floor ε of σ, or σ_data for EDM."""
    w = d_alpha * sigma - alpha * d_sigma
    zero = tl.zeros_like(sigma)
    one = zero + 1.0
    p, a, b, c, time, scale = one, zero, zero, zero, t, one
    if PREDICTION == PREDICT_VELOCITY:
        a, b, c = -d_alpha, -d_sigma, -d_gamma
    elif PREDICTION == PREDICT_NOISE:
        if COMPARE == COMPARE_VELOCITY:
            p = -w / alpha
        b = -p
    elif PREDICTION == PREDICT_DATA:
        if COMPARE == COMPARE_VELOCITY:
            p = w / tl.where(sigma > o0, sigma, o0)
        a = -p
    elif PREDICTION == PREDICT_SCORE:
        p, b = sigma, one
        if COMPARE == COMPARE_VELOCITY:
            p, b = w * sigma / alpha, w / alpha
    else:
        tl.static_assert(PREDICTION == PREDICT_EDM)
        root = tl.sqrt(sigma * sigma + alpha * alpha * o0 * o0)
        a, b = -sigma / (o0 * root), alpha * o0 / root
        time = 0.25 * tl.log(tl.where(sigma > TINY, sigma, TINY) / tl.where(alpha > TINY, alpha, TINY))
        scale = 1.0 / root
    return p, a, b, c, time, scale


# ---- rho.h --------------------------------------------------------------------------------------------------------


@triton.jit
def rho(RHO: tl.constexpr, k, r):
    if RHO == RHO_ABSOLUTE:
        return tl.abs(r)
    elif RHO == RHO_PSEUDO_HUBER:
        return r * r / (tl.sqrt(r * r + k * k) + k)
    else:
        return r * r


@triton.jit
def d_rho(RHO: tl.constexpr, k, r):
    if RHO == RHO_ABSOLUTE:
        return tl.where(r > 0.0, 1.0, tl.where(r < 0.0, -1.0, r))  # r: 0 at 0, NaN stays NaN
    elif RHO == RHO_PSEUDO_HUBER:
        return r / tl.sqrt(r * r + k * k)
    else:
        return 2.0 * r


# ---- permutation.h ------------------------------------------------------------------------------------------------


@triton.jit
def hash32(x):
    """The 32-bit finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def swap_or_not(x, n, pick, salt):
    """One round: x moves to its partner (K − x) mod n where a hash of the pair's larger member says so."""
    k = tl.umulhi(pick, n)
    partner = tl.where(k >= x, k - x, k + n - x)
    larger = tl.where(x > partner, x, partner)
    return tl.where((hash32(larger ^ salt) >> 31) == 1, partner, x)


@triton.jit
def permute(seed, n, x):
    """A keyed bijection of [0, n), n < 2³¹; n and x are uint32."""
    zero = tl.zeros_like(x).to(tl.int64)
    word = tl.full([], STREAM_PERMUTATION, tl.uint32)
    for pair in tl.static_range(ROUND_PAIRS):
        w0, w1, w2, w3 = philox_row(seed, zero, zero + pair, word)
        x = swap_or_not(x, n, w0, w1)
        x = swap_or_not(x, n, w2, w3)
    return x


# ---- timestep.h ---------------------------------------------------------------------------------------------------


@triton.jit
def inverse_normal_cdf(u):
    """Φ⁻¹ by Wichura's rational approximations (Algorithm AS 241, PPND16), fp64."""
    q = u - 0.5
    r = 0.180625 - q * q
    a = r * 2.5090809287301226727e3 + 3.3430575583588128105e4
    a = a * r + 6.7265770927008700853e4
    a = a * r + 4.5921953931549871457e4
    a = a * r + 1.3731693765509461125e4
    a = a * r + 1.9715909503065514427e3
    a = a * r + 1.3314166789178437745e2
    a = a * r + 3.3871328727963666080e0
    b = r * 5.2264952788528545610e3 + 2.8729085735721942674e4
    b = b * r + 3.9307895800092710610e4
    b = b * r + 2.1213794301586595867e4
    b = b * r + 5.3941960214247511077e3
    b = b * r + 6.8718700749205790830e2
    b = b * r + 4.2313330701600911252e1
    b = b * r + 1.0
    central = q * a / b

    tail = tl.sqrt(-tl.log(tl.where(q < 0.0, u, 1.0 - u)))
    r = tail - 1.6
    a = r * 7.74545014278341407640e-4 + 2.27238449892691845833e-2
    a = a * r + 2.41780725177450611770e-1
    a = a * r + 1.27045825245236838258e0
    a = a * r + 3.64784832476320460504e0
    a = a * r + 5.76949722146069140550e0
    a = a * r + 4.63033784615654529590e0
    a = a * r + 1.42343711074968357734e0
    b = r * 1.05075007164441684324e-9 + 5.47593808499534494600e-4
    b = b * r + 1.51986665636164571966e-2
    b = b * r + 1.48103976427480074590e-1
    b = b * r + 6.89767334985100004550e-1
    b = b * r + 1.67638483018380384940e0
    b = b * r + 2.05319162663775882187e0
    b = b * r + 1.0
    near = a / b

    r = tail - 5.0
    a = r * 2.01033439929228813265e-7 + 2.71155556874348757815e-5
    a = a * r + 1.24266094738807843860e-3
    a = a * r + 2.65321895265761230930e-2
    a = a * r + 2.96560571828504891230e-1
    a = a * r + 1.78482653991729133580e0
    a = a * r + 5.46378491116411436990e0
    a = a * r + 6.65790464350110377720e0
    b = r * 2.04426310338993978564e-15 + 1.42151175831644588870e-7
    b = b * r + 1.84631831751005468180e-5
    b = b * r + 7.86869131145613259100e-4
    b = b * r + 1.48753612908506148525e-2
    b = b * r + 1.36929880922735805310e-1
    b = b * r + 5.99832206555887937690e-1
    b = b * r + 1.0
    outer = tl.where(tail <= 5.0, near, a / b)

    return tl.where(tl.abs(q) <= 0.425, central, tl.where(q < 0.0, -outer, outer))


@triton.jit
def timestep_inverse_cdf(SAMPLER: tl.constexpr, q0, q1, shift, SHIFTED: tl.constexpr, u):
    t = u
    if SAMPLER == UNIFORM:
        t = q0 + (q1 - q0) * u
    elif SAMPLER == LOGIT_NORMAL:
        t = 1.0 / (1.0 + tl.exp(-(q0 + q1 * inverse_normal_cdf(u))))
    elif SAMPLER == MODE:
        sine = sin_pi(0.5 * u)
        t = u - q0 * (sine * sine - u)
    elif SAMPLER == COS_MAP:
        sine = sin_pi(0.5 * u)
        t = sine / (sine + cos_pi(0.5 * u))
    else:
        tl.static_assert(SAMPLER == BETA)
        t = -q0 * expm1(tl.log(u) / q1)
    if SHIFTED:
        t = t / (shift - (shift - 1.0) * t)
    return t


@triton.jit
def timestep_uniform(seed, row, strata, STRATIFIED: tl.constexpr):
    """The uniform of a row in fp64: its own word, or that word's place in stratum π(row) of ``strata``."""
    word = tl.full([], STREAM_TIME, tl.uint32)
    w0, w1, w2, w3 = philox_row(seed, row, tl.zeros_like(row), word)
    u = uniform(w0)
    if STRATIFIED:
        stratum = permute(seed, strata.to(tl.uint32), row.to(tl.uint32))
        u = (stratum.to(tl.float64) + u) / strata.to(tl.float64)
    return u


@triton.jit
def clamp(x, low, high):
    """x inside [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


# ---- time.h -------------------------------------------------------------------------------------------------------


@triton.jit
def nudged(t, towards):
    """The next number from t in the direction of the sign of ``towards`` (fp64), as C's nextafter."""
    BITS: tl.constexpr = tl.int64 if t.dtype == tl.float64 else tl.int32
    LOWEST: tl.constexpr = -(2**63) if t.dtype == tl.float64 else -(2**31)
    up = towards.to(tl.int64, bitcast=True) >= 0
    bits = t.to(BITS, bitcast=True)
    away = (bits >= 0) == up  # from zero
    moved = tl.where(away, bits + 1, bits - 1)
    smallest = tl.where(up, 1, LOWEST + 1)
    moved = tl.where(t == 0.0, smallest.to(BITS), moved).to(t.dtype, bitcast=True)
    return tl.where((tl.abs(t) < float("inf")) | ((t == t) & ~away), moved, t)  # NaN and the end of the line stay


# ---- step_control.h -----------------------------------------------------------------------------------------------

# Rows of control, of counters, and entries of settings, in the order of the op.
T, T_NEXT, END, ERROR, OLDER_ERROR, T_PREVIOUS, RATIO = map(tl.constexpr, range(step_op.CONTROL))
STATUS, ACCEPTED, REJECTED, CURSOR, AFTER_REJECTION, RUNNING = map(tl.constexpr, range(step_op.COUNTERS))
(
    SAFETY, MIN_FACTOR, MAX_FACTOR, BETA1, BETA2, BETA3, ACCEPTED_FLOOR, AFTER_REJECTION_CAP, MIN_STEP, MAX_STEP, CLIP,
    STEP_LIMIT, ACCEPT_AT_MIN_STEP, SNAP,
) = map(tl.constexpr, range(step_op.SETTINGS))  # fmt: skip
RUNNING_STATUS = tl.constexpr(step_op.RUNNING_STATUS)
DONE = tl.constexpr(step_op.DONE)
MAX_STEPS = tl.constexpr(step_op.MAX_STEPS)
UNDERFLOW = tl.constexpr(step_op.UNDERFLOW)
NON_FINITE = tl.constexpr(step_op.NON_FINITE)
SMALLEST_RATIO = tl.constexpr(step_op.SMALLEST_RATIO)
SNAP_ULPS = tl.constexpr(step_op.SNAP_ULPS)
UNDERFLOW_SPAN = tl.constexpr(step_op.UNDERFLOW_SPAN)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def log2_of(x):
    """log₂ x of a positive normal number in fp64."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    w = z * z
    even = (0.2209130842311768 * w + 0.32059853491395984) * w + 0.5770780163455203
    odd = (0.2136589569431927 * w + 0.262334352504183) * w + 0.4121985858409005
    return exponent.to(tl.float64) + ((odd * w + 0.9617966939259898) * z + even * w + 2.8853900817779268) * s


@triton.jit
def exp2_of(x):
    """2^x in fp64, of x clamped to ±1000."""
    shifted = clamp(x, -1000.0, 1000.0) + 6755399441055744.0  # 1.5·2⁵², whose low bits take the nearest integer
    f = clamp(x, -1000.0, 1000.0) - (shifted - 6755399441055744.0)
    w = f * f
    even = (7.074194297288521e-09 * w + 1.3215432535912375e-06) * w + 0.00015403530463724353
    odd = (4.4558179083360645e-10 * w + 1.0178057087733941e-07) * w + 1.5252733841556773e-05
    even = ((even * w + 0.009618129107587256) * w + 0.24022650695910158) * w + 1.0
    odd = ((odd * w + 0.001333355814640647) * w + 0.055504108664821625) * w + 0.6931471805599453
    exponent = shifted.to(tl.int64, bitcast=True) - 0x4338000000000000
    return (odd * f + even) * ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def decide(settings, t, t_next, end, error, older_error, ratio, finite, attempts, after_rejection):
    """(accepted, the ratio as powers take it, the end of the next step, status) of running rows; all times in fp64.

    ``ratio`` is infinite where it is not finite.
    """
    h = t_next - t
    direction = tl.where(end > t, 1.0, tl.where(end < t, -1.0, end - t))
    min_step, min_factor = tl.load(settings + MIN_STEP), tl.load(settings + MIN_FACTOR)
    rounding = tl.maximum(tl.abs(t), tl.abs(t_next)) * SNAP_ULPS  # of t_next
    at_min = tl.where(tl.abs(h) - rounding <= min_step, min_step, 0.0) > 0.0
    forced = tl.where(at_min, tl.load(settings + ACCEPT_AT_MIN_STEP), 0.0) > 0.0
    accepted = finite & ((ratio <= 1.0) | forced)

    small = tl.maximum(ratio, SMALLEST_RATIO)
    power = tl.load(settings + BETA1) * log2_of(small)
    power += tl.load(settings + BETA2) * log2_of(error) + tl.load(settings + BETA3) * log2_of(older_error)
    factor = tl.where(finite, tl.load(settings + SAFETY) * exp2_of(-power), min_factor)
    low = tl.where(accepted & (ratio < 1.0), tl.load(settings + ACCEPTED_FLOOR), min_factor)
    high = tl.where(after_rejection, tl.load(settings + AFTER_REJECTION_CAP), tl.load(settings + MAX_FACTOR))
    high = tl.where(accepted, high, tl.maximum(tl.load(settings + SAFETY), min_factor))
    size = tl.abs(h) * tl.minimum(tl.maximum(factor, low), high)
    size = tl.minimum(tl.maximum(size, min_step), tl.load(settings + MAX_STEP))

    now = tl.where(accepted, t_next, t)
    following = now + direction * size
    snap = tl.maximum(tl.abs(now), tl.abs(end)) * SNAP_ULPS + tl.load(settings + SNAP) * size
    clipped = tl.where((end - following) * direction <= snap, tl.load(settings + CLIP), 0.0) > 0.0
    following = tl.where(clipped, end, following)
    stuck = (following == now) | (size <= tl.abs(end - now) * UNDERFLOW_SPAN)
    stuck = stuck | (~accepted & (at_min | (following == t_next)))  # the step that was rejected, again
    status = tl.where(attempts.to(tl.float64) >= tl.load(settings + STEP_LIMIT), MAX_STEPS, RUNNING_STATUS)
    status = tl.where(stuck, tl.where(finite, UNDERFLOW, NON_FINITE), status)
    status = tl.where(accepted & ((end - now) * direction <= 0.0), DONE, status)
    return accepted, small, following, status
