r"""Explicit Runge–Kutta methods as tables of coefficients, each with its dense output.

A step of size h from (t, y) evaluates s stages and forms the solution, an estimate of its error and an interpolant:

    k_i = f(t + c_i h, y + h Σ_{j<i} a_ij k_j)                     y(t + h)  ≈ y + h Σ_j b_j k_j
    err = h Σ_j e_j k_j,  e = b − b̂                                y(t + θh) ≈ y + h Σ_j b_j(θ) k_j,  0 ≤ θ ≤ 1

`ADAPTIVE` holds the methods of `solve`, `FIXED` the ones without an error estimate, and `TORCHDIFFEQ` those of
torchdiffeq (github.com/rtqichen/torchdiffeq), coefficient for coefficient, with its interpolants.

Every interpolant of `ADAPTIVE` is a cubic Hermite polynomial through both ends plus what vanishes doubly there, so that
b_j(1) = b_j and the piecewise solution has a continuous derivative:

    b(θ) = H(θ) + θ²(1 − θ)² q(θ),   H(θ) = (θ − 2θ² + θ³) ê_1 + (3θ² − 2θ³) b + (θ³ − θ²) ê_s

where ê_j is the j-th unit vector and the last stage is f(t + h, y(t + h)). Evaluate b_j(θ) in float64: its monomials
cancel, up to a factor of 10² in dopri8.

| method | order, stages | source | interpolant |
|---|---|---|---|
| dopri5 | 5(4), 7 | Dormand & Prince 1980; Hairer, Nørsett & Wanner, Solving ODEs I, II.5 | quartic, order 4 (DOPRI5) |
| tsit5 | 5(4), 7 | Tsitouras 2011, Comput. Math. Appl. 62(2) | quartic, order 4 (the paper) |
| dopri8 | 8(7), 14 | Prince & Dormand 1981, J. Comput. Appl. Math. 7(1), RK8(7)13M | sextic, order 5 (below) |
| bosh3 | 3(2), 4 | Bogacki & Shampine 1989, Appl. Math. Lett. 2(4) | Hermite, order 3 |
| fehlberg2 | 2(1), 4 | Fehlberg 1969, NASA TR R-315, RK1(2); the second order advances | Hermite, order 2 |
| adaptive_heun | 2(1), 3 | the trapezoidal rule with an Euler predictor | Hermite, order 2 |

The last stage is the next step's first. An interpolant of order p satisfies, for every rooted tree τ of at most p
nodes, Σ_j b_j(θ) Φ_j(τ) = θ^|τ|/γ(τ): its error over a step is O(h^(p+1)).

The stages of dopri8 admit no interpolant of order 6. Leaving out stages 2 to 5, as b does, the conditions up to order 5
are those of quadrature, Σ_j c_j^k q_j(θ) = 0, 0, 0, 1/4, (2 + θ)/5 for k = 0 to 4. Among the quadratic q that satisfy
them, ours minimises ∫ (r_6² + 10⁻² r_7²) dθ + 10⁻¹⁴ |q|² (solved in 60 digits), where r_p² sums, over the trees of p
nodes, the squared residual of the condition over the tree's squared symmetry. It reaches (∫ r_6² dθ)^½ = 4·10⁻⁶.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["ADAPTIVE", "FIXED", "TORCHDIFFEQ", "Tableau", "hermite", "linear"]

Weights = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Tableau:
    r"""An explicit Runge–Kutta method with s stages; the formulas are those of the module.

    Attributes:
        name: of the method.
        order: of the solution that is advanced.
        c: s nodes.
        a: s rows; row i holds the i weights of the stages before it, the first is empty.
        b: s weights of the solution.
        error: s weights e = b − b̂ of the error estimate, or None for a method of fixed steps.
        interpolant: s rows of equal length; ``interpolant[j][p - 1]`` is the coefficient of θ^p in b_j(θ).
        error_order: q in the step control h ∝ err^(−1/q), the order of b̂ plus one; None where ``error`` is.
    """

    name: str
    order: int
    c: Weights
    a: tuple[Weights, ...]
    b: Weights
    error: Weights | None
    interpolant: tuple[Weights, ...]
    error_order: int | None = None

    @property
    def fsal(self) -> bool:
        """Whether the last stage is f(t + h, y(t + h)), and so the first stage of the next step."""
        return self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0


def linear(tableau: Tableau) -> Tableau:
    """The method with the chord as its interpolant: b_j(θ) = b_j θ, continuous and of first order."""
    return replace(tableau, interpolant=tuple((weight,) for weight in tableau.b))


def hermite(tableau: Tableau) -> Tableau:
    """The method with the cubic through both ends and their derivatives as its interpolant, of order min(order, 3).

    Unless the last stage is f(t + h, y(t + h)) already, the result has it as one stage more.
    """
    tableau = _with_end_stage(tableau)
    return replace(tableau, interpolant=_interpolant(tableau.b))


def _with_end_stage(tableau: Tableau) -> Tableau:
    """The method with f(t + h, y(t + h)) as its last stage, of weight zero."""
    if tableau.fsal:
        return tableau
    return replace(
        tableau,
        c=(*tableau.c, 1.0),
        a=(*tableau.a, tableau.b),
        b=(*tableau.b, 0.0),
        error=None if tableau.error is None else (*tableau.error, 0.0),
        interpolant=(*tableau.interpolant, (0.0,) * len(tableau.interpolant[0])),
    )


def _interpolant(b: Weights, q: Sequence[Weights] | None = None) -> tuple[Weights, ...]:
    """The coefficients of b(θ) = H(θ) + θ²(1 − θ)² q(θ); q has a row a stage, or is absent."""
    degree = 3 if q is None else 4 + len(q[0]) - 1
    rows = []
    for j, weight in enumerate(b):
        first, last = float(j == 0), float(j == len(b) - 1)
        row = [first, 3 * weight - 2 * first - last, first + last - 2 * weight] + [0.0] * (degree - 3)
        for p, coefficient in enumerate(q[j] if q else (), start=1):
            row[p] += coefficient
            row[p + 1] -= 2 * coefficient
            row[p + 2] += coefficient
        rows.append(tuple(row))
    return tuple(rows)


def _quartic(b: Weights, middle: Weights) -> tuple[Weights, ...]:
    """The quartic through y, y + h Σ_j middle_j k_j at θ = 1/2 and y(t + h), of slope k_1 and k_s at its ends."""
    slopes = [float(j == 0) - float(j == len(b) - 1) for j in range(len(b))]
    return _interpolant(b, [(16 * m - 8 * w - 2 * slope,) for m, w, slope in zip(middle, b, slopes)])


def _tableau(
    name: str, order: int, c: Weights, a: Sequence[Weights], b: Weights, lower: Weights | None = None
) -> Tableau:
    """The method with the chord as its interpolant; ``lower`` is b̂, of the order before."""
    error = None if lower is None else tuple(weight - other for weight, other in zip(b, lower))
    chord = tuple((weight,) for weight in b)
    return Tableau(name, order, c, tuple(a), b, error, chord, None if lower is None else order)


_EULER = _tableau("euler", 1, (0.0,), ((),), (1.0,))
_MIDPOINT = _tableau("midpoint", 2, (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0))
_HEUN2 = _tableau("heun2", 2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2))
# Ralston 1962, Math. Comp. 16(80): the second-order method whose error bound is the least.
_RALSTON = _tableau("ralston", 2, (0.0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4))
_HEUN3 = _tableau("heun3", 3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))
# Kutta 1901: the classic method, and the 3/8 rule, whose error constants are smaller (Hairer et al., II.1).
_RK4 = _tableau(
    "rk4",
    4,
    (0.0, 1 / 2, 1 / 2, 1.0),
    ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
)
_RK4_38 = _tableau(
    "rk4_38",
    4,
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

_ADAPTIVE_HEUN = _tableau("adaptive_heun", 2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2), (0.0, 1.0))
_FEHLBERG2 = _tableau(
    "fehlberg2",
    2,
    (0.0, 1 / 2, 1.0),
    ((), (1 / 2,), (1 / 256, 255 / 256)),
    (1 / 512, 255 / 256, 1 / 512),
    (1 / 256, 255 / 256, 0.0),
)
_BOSH3 = _tableau(
    "bosh3",
    3,
    (0.0, 1 / 2, 3 / 4, 1.0),
    ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0.0),
    (7 / 24, 1 / 4, 1 / 3, 1 / 8),
)
_DOPRI5 = _tableau(
    "dopri5",
    5,
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60),
)
_DOPRI5_Q = (
    (-12715105075 / 11282082432,),
    (0.0,),
    (87487479700 / 32700410799,),
    (-10690763975 / 1880347072,),
    (701980252875 / 199316789632,),
    (-1453857185 / 822651844,),
    (69997945 / 29380423,),
)

_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
_TSIT5 = replace(
    _tableau(
        "tsit5",
        5,
        (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        (
            (),
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.02826905039406838),
            _TSIT5_B,
        ),
        (*_TSIT5_B, 0.0),
    ),
    # The paper lists b − b̂ under the name of b̂, except for the last: b̂_7 = 1/66.
    error=(
        0.00178001105222577714,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    error_order=5,
)
_TSIT5_Q = (
    (-1.0530884977290216,),
    (0.1017,),
    (2.490627285651252793,),
    (-16.54810288924490272,),
    (47.37952196281928122,),
    (-34.87065786149660974,),
    (2.5,),
)

_DOPRI8_B = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
_DOPRI8 = _tableau(
    "dopri8",
    8,
    (
        *(0.0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200),
        *(5490023248 / 9719169821, 13 / 20, 1201146811 / 1299019798, 1.0, 1.0, 1.0),
    ),
    (
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            *(29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000),
            23124283 / 1800000000,
        ),
        (
            *(16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777),
            *(545815736 / 2771057229, -180193667 / 1043307555),
        ),
        (
            *(39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301),
            *(100302831 / 723423059, 790204164 / 839813087, 800635310 / 3783071287),
        ),
        (
            *(246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803),
            *(-12992083 / 490766935, 6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789),
        ),
        (
            *(-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823),
            *(-10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649),
            *(-45442868181 / 3398467696, 3065993473 / 597172653),
        ),
        (
            *(185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517),
            *(-703635378 / 230739211, 5731566787 / 1027545527, 5232866602 / 850066563),
            *(-4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083),
        ),
        (
            *(403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805),
            *(652783627 / 914296604, 11173962825 / 925320556, -13158990841 / 6184727034),
            *(3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0.0),
        ),
        _DOPRI8_B,
    ),
    (*_DOPRI8_B, 0.0),
    (
        *(13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -808719846 / 976000145, 1757004468 / 5645159321),
        *(656045339 / 265891186, -3867574721 / 1518517206, 465885868 / 322736535, 53011238 / 667516719),
        *(2 / 45, 0.0, 0.0),
    ),
)
_DOPRI8_Q = (
    (-4.6186189492339071, 8.6972901566633648, -5.5536245517572756),
    *((0.0, 0.0, 0.0),) * 4,
    (-5.4115430671532251, 27.794897764844827, -29.84377197649767),
    (9.2727650297498056, -23.537908656471838, 17.367142916792117),
    (-1.8130873133179746, 4.2454013000144713, 1.6754488223391283),
    (2.4426811021761715, -15.760883793768982, 22.448480598729799),
    (0.51693214517071515, -5.9564133715610918, -0.46911438680358571),
    (-2.3627489202721593, 8.8730140875973319, -14.596993911476518),
    (2.8845517306684849, -7.4848359255784063, 15.765197260075287),
    (-5.0013707975486651, 19.557299689044113, -30.146106247177027),
    (4.090439039760754, -16.42786125078379, 23.353341475775744),
)

# y(t + h/2) of torchdiffeq's quartics: Shampine 1986 for dopri5; for dopri8 P. Stone's sextic at θ = 1/2.
_DOPRI5_MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
_DOPRI8_MIDDLE = (
    *(0.04103130360739393, 0.0, 0.0, 0.0, 0.0, 0.05100562801991382, 0.2388930677412202),
    *(0.3096870143996103, -0.2172325471755352, 0.07833405679331928, -0.0018614369715579948),
    *(0.007072844202678841, 0.00690847373200576, -0.013838404349047373),
)


def _registry(*tableaus: Tableau) -> dict[str, Tableau]:
    return {tableau.name: tableau for tableau in tableaus}


#: The methods with an error estimate, the last stage always f(t + h, y(t + h)), each with its own interpolant.
ADAPTIVE: dict[str, Tableau] = _registry(
    replace(_DOPRI5, interpolant=_interpolant(_DOPRI5.b, _DOPRI5_Q)),
    replace(_TSIT5, interpolant=_interpolant(_TSIT5.b, _TSIT5_Q)),
    replace(_DOPRI8, interpolant=_interpolant(_DOPRI8.b, _DOPRI8_Q)),
    hermite(_BOSH3),
    hermite(_FEHLBERG2),
    hermite(_ADAPTIVE_HEUN),
)

#: The methods of fixed steps, with the chord as their interpolant; `hermite` exchanges it.
FIXED: dict[str, Tableau] = _registry(_EULER, _MIDPOINT, _HEUN2, _HEUN3, _RALSTON, _RK4, _RK4_38)

#: torchdiffeq's methods. The quartic's slope at the end is the last stage, though in fehlberg2 and adaptive_heun that
#: is not f(t + h, y(t + h)), and it is where their next step starts. ``rk4`` is the 3/8 rule. `hermite` of a method of
#: fixed steps is ``interp="cubic"``.
TORCHDIFFEQ: dict[str, Tableau] = _registry(
    replace(_DOPRI5, interpolant=_quartic(_DOPRI5.b, _DOPRI5_MIDDLE)),
    replace(_DOPRI8, interpolant=_quartic(_DOPRI8.b, _DOPRI8_MIDDLE)),
    replace(_BOSH3, interpolant=_quartic(_BOSH3.b, (0.0, 1 / 2, 0.0, 0.0))),
    replace(_FEHLBERG2, interpolant=_quartic(_FEHLBERG2.b, (0.0, 1 / 2, 0.0))),
    replace(_ADAPTIVE_HEUN, interpolant=_quartic(_ADAPTIVE_HEUN.b, (1 / 2, 0.0))),
    _EULER,
    _MIDPOINT,
    _HEUN2,
    _HEUN3,
    replace(_RK4_38, name="rk4"),
)
