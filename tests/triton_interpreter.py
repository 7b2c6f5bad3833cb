"""Triton kernels under the interpreter; test_triton.py runs this file in a process of its own, because TRITON_INTERPRET
must be set before triton is imported. The contract suite does the same for whole ops.

Long rows run three times: on tiles that hold them, on tiles so small that a row is split over programs, and with so few
programs that each walks several tiles. Drawn numbers must not depend on it.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from contract_ode import SETTINGS, STEP
from contract_op import pairwise
from test_contract import check_values

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.objectives import RHOS, Objective
from fmkernels.ops.conditional_flow import FORMS
from fmkernels.ops.matching_loss import MatchingLoss, gradient_factor
from fmkernels.ops.noise import DISTRIBUTIONS, noise_reference
from fmkernels.ops.probe import PROBES, hadamard_order
from fmkernels.ops.sample_path import STORE_X0, STORE_Z, PathArguments
from fmkernels.triton_kernels import KERNELS, _tile, marginal_field, runge_kutta_step
from fmkernels.triton_kernels._probe_math import hadamard_word

pytestmark = pytest.mark.usefixtures("poison")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {"f32": F32, "f64": F64, "bf16": BF16, "f16": F16}
COLUMNS = {"D1": 1, "D3": 3, "D5": 5, "D70": 70, "D1030": 1030}
ROWS = 3
FIRST_ROW = 2**32 - 3
KEY = torch.tensor([-(2**62) + 12345])

PATHS = {  # schedule and objective; the contract suite pairs them all
    "CondOT": (fmk.CondOT(0.02), {}),
    "VP": (fmk.VP(), {}),
    "VE": (fmk.VE(), {"prediction": "score", "weight": "likelihood"}),
    "Cosine": (fmk.Cosine(), {"prediction": "data", "compare": "velocity", "weight": "cosmap"}),
    "LinearVP": (fmk.LinearVP(), {"weight": "sigma_sqrt"}),
    "SubVP": (fmk.SubVP(t_range=(1e-3, 1.0)), {"prediction": "score", "compare": "velocity"}),
    "Polynomial": (fmk.Polynomial(2.5), {"weight": "min_snr"}),
    "Polynomial_root": (fmk.Polynomial(0.5), {"prediction": "noise", "compare": "velocity"}),
    "EDM": (fmk.VP(), {"prediction": "edm"}),
    "DDPM": (fmk.Cosine(), {"prediction": "noise", "weight": "min_snr"}),
    "ConstantNoise": (fmk.ConstantNoise(0.1), {"prediction": "data"}),
    "SchrodingerBridge": (fmk.SchrodingerBridge(0.7), {}),
    "Custom": (fmk.Custom(lambda t: (t * t, 1 - t, t * (1 - t)), bridge=True), {}),
}
SAMPLERS = [
    fmk.Uniform(0.1, 0.9, shift=3.0), fmk.LogitNormal(0.3, 1.2), fmk.LogitNormal(stratified=True), fmk.Mode(),
    fmk.CosMap(), fmk.Beta(1.5, 0.999),
]  # fmt: skip
MASKS = {"no_mask": None, "rows": "rows", "runs": "runs", "elements": "elements"}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}

TILINGS = [(1024, 4096), (1024, 2)]  # elements of a tile, programs beyond which they walk several


def op(name):
    return _registration.overload(name)


def tilings(monkeypatch, columns, run):
    """What ``run`` returns on the tiles of a GPU and, for long rows, under each tiling."""
    results = [run()]
    for tile, programs in TILINGS if columns > TILINGS[0][0] else []:
        with monkeypatch.context() as patch:
            patch.setattr(_tile, "TILE", tile)
            patch.setattr(_tile, "MAX_PROGRAMS", programs)
            results.append(run())
    return results


def double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def assert_within(value, want, allowed, ulps=8):
    """|value − want| ≤ allowed plus ``ulps`` of the value's dtype."""
    assert not value.isnan().any()
    error = (value.double() - want).abs()
    rounding = ulps * torch.finfo(value.dtype).eps * want.abs() + torch.finfo(value.dtype).smallest_normal
    assert (error <= allowed + rounding).all(), f"off by {error.max()}: {value} instead of {want}"


def test_triton_answers():
    assert {_registration.answering(name, "cpu") for name in KERNELS} == {"triton"}
    assert set(KERNELS) == set(_registration.references)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_noise(columns, dtype, distribution, monkeypatch):
    arguments = (KEY, 3, columns, FIRST_ROW, 3, 2**24 - 1, DISTRIBUTIONS[distribution])
    whole, *others = tilings(monkeypatch, columns, lambda: op("noise")(*arguments, dtype))
    for other in others:
        assert torch.equal(whole, other)
    exact = noise_reference(*arguments, F64)
    absolute = {F64: 1e-14}.get(dtype, 8e-7) if distribution == "normal" else 0.0
    assert_within(whole, exact, absolute, ulps=0.51)


PATH_FACTORS = {
    "path": PATHS, "timesteps": {"drawn_t": True, "given_t": False}, "dtype": DTYPES, "columns": COLUMNS,
    "x0": {"drawn_x0": True, "given_x0": False},
}  # fmt: skip


def has_times(labels):
    return labels["path"] != "Custom" or labels["timesteps"] == "given_t"  # a table needs its times


@pytest.mark.parametrize("labels", pairwise(PATH_FACTORS, has_times), ids=lambda labels: "-".join(labels.values()))
def test_sample_path(labels, monkeypatch):
    level = {name: PATH_FACTORS[name][label] for name, label in labels.items()}
    (schedule, objective), dtype, columns = level["path"], level["dtype"], level["columns"]
    x1, x0 = torch.randn(ROWS, columns).to(dtype), torch.randn(ROWS, columns).to(dtype)
    x0 = None if level["x0"] else x0
    t = None if level["timesteps"] else torch.linspace(*schedule.t_range, ROWS)
    table = None
    if labels["path"] == "Custom":
        table = torch.stack(schedule.coefficients(t.to(F64 if dtype == F64 else F32)), dim=-1)
    path = PathArguments.of(Objective(schedule, **objective), fmk.Uniform())
    bits = (STORE_X0 if x0 is None else 0) | (STORE_Z if path.bridge else 0)
    rest = (KEY, FIRST_ROW, 0, 1, *path)

    whole, *others = tilings(monkeypatch, columns, lambda: op("sample_path")(x1, x0, t, table, *rest, bits))
    for other in others:
        for value, same in zip(other, whole, strict=True):
            assert torch.equal(value, same)
    x_t, drawn_t, rows, drawn_x0, drawn_z = whole
    assert torch.equal(op("sample_path")(x1, x0, t, table, *rest, 0)[0], x_t)  # storing changes nothing
    reference = _registration.references["sample_path"]
    other = reference(x1, x0, t, table, *rest, bits)
    assert [(v.shape, v.dtype, v.stride()) for v in whole] == [(v.shape, v.dtype, v.stride()) for v in other]
    assert_within(drawn_t, other[1].double(), 2 * torch.finfo(drawn_t.dtype).eps)
    if x0 is None:
        assert torch.equal(drawn_x0, op("noise")(KEY, ROWS, columns, FIRST_ROW, 0, 0, 0, dtype))
    if path.bridge:
        assert torch.equal(drawn_z, op("noise")(KEY, ROWS, columns, FIRST_ROW, 1, 0, 0, dtype))

    source = drawn_x0 if x0 is None else x0
    want = reference(*double((x1, source, drawn_t, table)), *rest, 0)
    again = reference(x1, source, drawn_t, table, *rest, 0)
    # The terms of x_t may cancel. The bridge's noise, which the reference draws in fp64 above, is rounded in the path.
    slack = 16 * torch.finfo(dtype if path.bridge else rows.dtype).eps * (1 + want[0].abs().max())
    assert_within(x_t, want[0], 2 * (again[0].double() - want[0]).abs() + slack)
    assert_within(rows, want[2], 2 * (again[2].double() - want[2]).abs())


@pytest.mark.parametrize("timesteps", SAMPLERS, ids=repr)
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_drawn_times(timesteps, dtype):
    path = PathArguments.of(Objective(fmk.CondOT()), timesteps)
    strata, first_row = (200, 50) if timesteps.stratified else (0, FIRST_ROW)
    arguments = (torch.randn(100, 1).to(dtype), None, None, None, KEY, first_row, strata, 1, *path, 0)
    drawn = op("sample_path")(*arguments)[1]
    assert_within(drawn, _registration.references["sample_path"](*arguments)[1].double(), 0.0)
    assert drawn.unique().numel() == 100


LOSS_SHAPES = {  # a mask over the first two dimensions covers runs, whose length 4 divides or not
    "D1": (1, 1), "D3": (3, 1), "D5": (1, 5), "D70": (7, 10), "D1030": (2, 515), "D1056": (8, 132),
}  # fmt: skip
LOSS_FACTORS = {
    "prediction": DTYPES, "data": DTYPES, "table": {"t32": F32, "t64": F64}, "shape": LOSS_SHAPES, "mask": MASKS,
    "terms": {"x1": 1, "x0": 2, "x1+x0": 3, "x1+x0+z": 7}, "noise": {"recompute": False, "store": True},
    "t_dims": {"t_sample": 1, "t_token": 2}, "weight": {"plain": False, "weighted": True}, "rho": RHOS,
    "reduction": REDUCTIONS,
}  # fmt: skip


@pytest.mark.parametrize(
    "labels", pairwise(LOSS_FACTORS, lambda labels: True), ids=lambda labels: "-".join(labels.values())
)
def test_matching_loss(labels, monkeypatch):
    level = {name: LOSS_FACTORS[name][label] for name, label in labels.items()}
    shape, t_dims = (ROWS, *level["shape"]), level["t_dims"]
    rows, columns = math.prod(shape[:t_dims]), math.prod(shape[t_dims:])
    prediction, x1 = torch.randn(shape).to(level["prediction"]), torch.randn(shape).to(level["data"])
    table = torch.randn(*shape[:t_dims], 6).to(level["table"])
    x0 = z = None
    noise = [op("noise")(KEY, rows, columns, FIRST_ROW, s, 0, 0, level["data"]).reshape(shape) for s in (0, 1)]
    if level["noise"]:
        x0, z = noise
    mask = None
    if level["mask"] is not None:
        mask = torch.rand({"rows": shape[:1], "runs": shape[:2], "elements": shape}[level["mask"]]) < 0.6
        mask[0] = False
        kept = mask.reshape(mask.shape + (1,) * (3 - mask.dim())).expand(shape)
        prediction[~kept] = x1[~kept] = math.nan  # what is left out must stay out
    weight = torch.rand(shape[:t_dims]).to(level["table"]) if level["weight"] else None
    rest = (table, weight, mask, KEY, FIRST_ROW, level["terms"], level["rho"], 0.7, level["reduction"])
    arguments = (prediction, x1, x0, z, *rest)

    run = op("_matching_loss_forward")
    whole, *others = tilings(monkeypatch, columns, lambda: run(*arguments, True))
    loss, gradient, denominator = whole
    for other in others:
        torch.testing.assert_close(other[0], loss, rtol=1e-5, atol=1e-6)
        assert torch.equal(other[1], gradient) and torch.equal(other[2], denominator)
    again = op("_matching_loss_forward")(*arguments, False)
    assert torch.equal(again[0], loss) and again[1].numel() == again[2].numel() == 0
    assert torch.equal(op("matching_loss")(*arguments), loss)

    forward = _registration.references["_matching_loss_forward"]
    same = forward(*arguments, True)
    assert [(v.shape, v.dtype, v.stride()) for v in whole] == [(v.shape, v.dtype, v.stride()) for v in same]
    want = forward(*double((prediction, x1, *noise, *rest)), True)
    factor = gradient_factor(prediction, table, mask, level["reduction"])
    scaling = level["reduction"] == REDUCTIONS["mean"] and mask is None and factor != 1
    wanted_gradient = want[1] * (prediction.numel() if scaling else 1)
    # A residual cancels: its error is relative to its largest term, a few units for these data.
    unit = 200 * torch.finfo(loss.dtype if weight is None else table.dtype).eps
    assert_within(loss, want[0], unit * (1 + want[0].abs()))
    assert_within(gradient, wanted_gradient, unit * (1 + wanted_gradient.abs().max()))
    assert_within(denominator, want[2], 0.0)

    for scale in (torch.rand(loss.shape, dtype=loss.dtype), torch.ones(loss.shape, dtype=loss.dtype)):
        scaled = op("_scale_gradient")(gradient, scale, denominator, factor)
        expected = _registration.references["_scale_gradient"](*double((gradient, scale, denominator)), factor)
        assert_within(scaled, expected, 0.0)
        for in_place in (gradient.clone(), gradient.transpose(1, 2).contiguous().transpose(1, 2)):
            op("_scale_gradient_")(in_place, scale, denominator, factor)
            assert torch.equal(in_place, scaled)


GUIDED_DTYPES = {
    "f32": (F32, F32),
    "f64": (F64, F64),
    "bf16": (BF16, BF16),
    "f32_bf16": (F32, BF16),
    "f32_f64": (F32, F64),
}
GUIDED_FACTORS = {
    "dtypes": GUIDED_DTYPES, "columns": COLUMNS | {"D5000": 5000}, "h": {"h": None, "h_one": (), "h_rows": (ROWS,)},
    "scale": {"w": None, "w_one": (), "w_rows": (ROWS,)}, "rescale": {"plain": 0.0, "rescaled": 0.7},
}  # fmt: skip


def has_a_std(labels):
    return labels["rescale"] == "plain" or labels["columns"] != "D1"


@pytest.mark.parametrize("labels", pairwise(GUIDED_FACTORS, has_a_std), ids=lambda labels: "-".join(labels.values()))
def test_guided_euler(labels, monkeypatch):
    """On long rows also with at most three programs to measure one: each then joins the moments of several tiles."""
    from fmkernels.triton_kernels import guided_euler

    level = {name: GUIDED_FACTORS[name][label] for name, label in labels.items()}
    (dtype, velocity), columns = level["dtypes"], level["columns"]
    x, c, u = torch.randn(ROWS, columns).to(dtype), *(torch.randn(2, ROWS, columns) + 3).to(velocity)
    h, scale = (None if level[name] is None else torch.rand(level[name]) for name in ("h", "scale"))
    arguments = (x, c, u, h, scale, -0.3, 6.5, level["rescale"])
    run = op("guided_euler")
    whole, *others = tilings(monkeypatch, columns, lambda: run(*arguments))
    monkeypatch.setattr(guided_euler, "PARTS", 3)
    others += tilings(monkeypatch, columns, lambda: run(*arguments)) if columns > 4096 else []
    want = _registration.references["guided_euler"](*double(arguments))
    slack = 64 * torch.finfo(F64 if F64 in level["dtypes"] else F32).eps * 20  # of terms up to 20
    for value in (whole, *others):
        assert (value.shape, value.dtype, value.stride()) == (x.shape, x.dtype, x.stride())
        assert_within(value, want, slack, ulps=0.51)
        assert level["rescale"] or torch.equal(value, whole)


FLOW_FACTORS = {"form": FORMS, "dtype": DTYPES, "columns": COLUMNS}


@pytest.mark.parametrize(
    "labels", pairwise(FLOW_FACTORS, lambda labels: True), ids=lambda labels: "-".join(labels.values())
)
def test_conditional_flow(labels, monkeypatch):
    """The reference's numbers, to the bit: every operation is rounded as it stands."""
    form, dtype, columns = (FLOW_FACTORS[name][label] for name, label in labels.items())
    x0, x1, noise = torch.randn(3, ROWS, columns).to(dtype)
    coefficients = 0.2 + torch.rand(ROWS, 4, dtype=F64 if dtype == F64 else F32)
    arguments = (x0, x1, None if form == FORMS["affine"] else noise, coefficients, form)
    want = _registration.references["conditional_flow"](*arguments)
    for values in tilings(monkeypatch, columns, lambda: op("conditional_flow")(*arguments)):
        for value, wanted in zip(values, want, strict=True):
            assert value.dtype == wanted.dtype and torch.equal(value, wanted)


PROBE_FACTORS = {
    "distribution": PROBES, "dtype": DTYPES, "columns": {"D1": 1, "D3": 3, "D40": 40, "D128": 128, "D2060": 2060},
    "first_probe": {"first": 0, "later": 2},
}  # fmt: skip


@triton.jit
def hadamard_words(c, word, out):
    i = tl.arange(0, 64)
    words = hadamard_word(tl.load(c + i).to(tl.uint32), tl.load(word + i).to(tl.uint32))
    tl.store(out + i, words.to(tl.int64))


def has_probes(labels):
    level = {name: PROBE_FACTORS[name][label] for name, label in labels.items()}
    return labels["distribution"] != "hadamard" or level["first_probe"] + 2 <= hadamard_order(level["columns"])


@pytest.mark.parametrize("labels", pairwise(PROBE_FACTORS, has_probes), ids=lambda labels: "-".join(labels.values()))
def test_probes(labels, monkeypatch):
    """Whatever the tiling, the same probes, and sums that differ by the order of their terms alone."""
    level = {name: PROBE_FACTORS[name][label] for name, label in labels.items()}
    distribution, dtype, columns, first = (level[name] for name in ("distribution", "dtype", "columns", "first_probe"))
    z, *others = tilings(
        monkeypatch, columns, lambda: op("probe")(KEY, ROWS, columns, distribution, 2, first, FIRST_ROW, dtype)
    )
    for other in others:
        assert torch.equal(other, z)
    exact = _registration.references["probe"](KEY, ROWS, columns, distribution, 2, first, FIRST_ROW, F64)
    assert_within(z, exact, 8e-7 if distribution == PROBES["normal"] else 0.0, ulps=0.51)
    values = torch.randn(2, ROWS, columns).to(dtype)
    terms = z.double() * values.double()
    slack = 8 * torch.finfo(F64 if dtype == F64 else F32).eps * terms.abs().sum(2)
    for sums in tilings(monkeypatch, columns, lambda: op("probe_dot")(KEY, values, distribution, first, FIRST_ROW)):
        assert_within(sums, terms.sum(2), slack)


def test_words_of_a_hadamard_matrix():
    """Far along a row too, where no test of a whole op reaches."""
    c, word = torch.randint(2**30, (64,)), torch.randint(2**25, (64,))
    out = torch.empty(64, dtype=torch.int64)
    hadamard_words[(1,)](c, word, out)
    for column, w, bits in zip(c.tolist(), word.tolist(), out.tolist()):
        assert bits == sum(((32 * w + lane) & column).bit_count() % 2 << lane for lane in range(32))


def test_a_guided_velocity_that_is_constant_is_not_rescaled():
    x, c, u = torch.zeros(ROWS, 5000), torch.randn(ROWS, 5000), torch.full((ROWS, 5000), 0.1)
    assert torch.equal(op("guided_euler")(x, c, u, None, None, 1.0, 0.0, 1.0), u)
    assert torch.equal(op("guided_euler")(x, u, u, None, None, 1.0, 7.3, 0.5), u)


ROWS_OF_STEPS = {  # what the step of a long row takes into account
    "dtype": DTYPES, "ratio": {"computed": "computed", "given": "given"}, "components": {"real": 1, "complex": 2},
    "segments": {"one_segment": "one_segment", "two_segments": "two_segments"},
    "t_eval": {"none": "none", "each": "each"}, "ks": {"k2": 2, "k6": 6},
    "rows": {"wild": "wild", "last": "last"},
}  # fmt: skip


@pytest.mark.parametrize(
    "labels", pairwise(ROWS_OF_STEPS, lambda labels: True), ids=lambda labels: "-".join(labels.values())
)
def test_runge_kutta_step_of_long_rows(labels, monkeypatch):
    """Split over programs, of one tile each or of several: the numbers of a row in one program, and those expected."""
    level = {name: ROWS_OF_STEPS[name][label] for name, label in labels.items()}
    level |= {
        "shape": ((ROWS, 3078), 1),
        "settings": SETTINGS["pid"],
        "tolerance": "mixed",
        "direction": "mixed",
        "seed": 0,
    }
    arguments = STEP.make(level, torch.device("cpu"))
    whole = STEP.run(arguments)
    check_values(STEP, arguments, whole)
    launched = []
    launch = runge_kutta_step.launch
    monkeypatch.setattr(runge_kutta_step, "launch", lambda *a, **k: (launched.append(a[1]), launch(*a, **k)))
    monkeypatch.setattr(runge_kutta_step, "LONG_ROW", 256)
    for most in (1024, 2):
        monkeypatch.setattr(runge_kutta_step, "MAX_PARTS", most)
        outputs = STEP.run(arguments)
        check_values(STEP, arguments, outputs)
        for i in (0, 1, 3):
            assert torch.equal(outputs[i], whole[i])
    assert len(launched) == 4 and launched[0] > launched[2] > ROWS


@pytest.mark.parametrize(("dtype", "columns", "weighted"), [(F32, 3, False), (F32, 70, True), (F64, 70, False)])
def test_marginal_field_of_several_tiles(dtype, columns, weighted, monkeypatch):
    """Points of which all, some and one weigh something: what is added up, evicted from the list and rescaled."""
    from fmkernels.ops.marginal_field import posterior_moments

    monkeypatch.setattr(marginal_field, "TILE", 64)
    monkeypatch.setattr(marginal_field, "ROW_BLOCK", 32)
    data, alpha = torch.randn(250, columns).to(dtype), torch.tensor([0.02, 0.5, 0.999], dtype=F64)
    sigma = 1 - alpha
    x = (alpha[:, None] * data[-ROWS:] + sigma[:, None] * torch.randn(ROWS, columns)).to(dtype)
    log_weights = torch.rand(250, dtype=F64).log_softmax(0) if weighted else None
    moments = op("marginal_field")(x, alpha, sigma, data, log_weights, None, None)
    want = posterior_moments(x.double(), alpha, sigma, data.double(), log_weights)
    unit = 1e-5 if dtype == F32 else 1e-12
    for value, wanted in zip(moments, want):
        wanted = wanted.reshape(ROWS, -1)
        error = (value.double().reshape(ROWS, -1) - wanted).norm(dim=1)
        assert (error <= unit * (1e-2 + wanted.norm(dim=1))).all()


def test_absolute_value_has_the_gradient_of_its_sign():
    prediction = torch.tensor([[-2.0, 0.0, 3.0, math.nan]])
    table = torch.tensor([[1.0, 0, 0, 0, 1, 0]])
    _, gradient, _ = op("_matching_loss_forward")(
        prediction, prediction, None, None, table, None, None, KEY, 0, 0, RHOS["absolute"], 1.0, REDUCTIONS["sum"], True
    )
    assert gradient[0, :3].tolist() == [-1, 0, 1] and gradient[0, 3].isnan()


def test_the_float16_gradient_of_a_mean_is_divided_in_the_backward():
    prediction, table = torch.full((4, 1000), 1e-3, dtype=F16), torch.tensor([1.0, 0, 0, 0, 1, 0]).expand(4, 6)
    arguments = (
        prediction,
        prediction,
        None,
        None,
        table,
        None,
        None,
        KEY,
        0,
        0,
        RHOS["square"],
        1.0,
        REDUCTIONS["mean"],
    )
    _, gradient, denominator = op("_matching_loss_forward")(*arguments, True)
    assert torch.equal(gradient, 2 * prediction) and denominator.numel() == 0


def test_a_gradient_scaled_by_one_is_not_written(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    written = []
    store = type(interpreter_builder).create_masked_store
    monkeypatch.setattr(
        type(interpreter_builder), "create_masked_store", lambda self, *a: (written.append(1), store(self, *a))[1]
    )
    gradient = torch.randn(3, 70)
    for scale, stores in ((1.0, 0), (2.0, 1)):
        written.clear()
        op("_scale_gradient_")(gradient, torch.tensor(scale), torch.empty(0), 1.0)
        assert bool(written) == bool(stores)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape):
    x1, key = torch.randn(shape), KEY
    path = PathArguments.of(Objective(fmk.CondOT()), fmk.Uniform())
    for value, other in zip(
        op("sample_path")(x1, None, None, None, key, 0, 0, 1, *path, STORE_X0),
        _registration.references["sample_path"](x1, None, None, None, key, 0, 0, 1, *path, STORE_X0),
    ):
        torch.testing.assert_close(value, other)
    for reduction in REDUCTIONS.values():
        for mask in (None, torch.ones(shape, dtype=torch.bool)):
            arguments = (x1, x1, None, None, torch.rand(shape[0], 6), None, mask, key, 0, 3, 0, 1.0, reduction, True)
            values = op("_matching_loss_forward")(*arguments)
            for value, other in zip(values, _registration.references["_matching_loss_forward"](*arguments)):
                assert value.shape == other.shape and torch.equal(value, other)
    assert op("noise")(key, *shape, 0, 0, 0, 0, F32).shape == shape


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_strata_are_each_hit_once(rows):
    sampler = fmk.Uniform(stratified=True)
    batch = fmk.ops.sample_path(torch.randn(rows, 2), key=KEY, timesteps=sampler)
    assert (batch.t * rows).floor().sort().values.tolist() == list(range(rows))


def test_backward_through_the_public_function():
    fm = fmk.FlowMatching(fmk.VP(), noise="recompute")
    batch = fm.sample(torch.randn(4, 33), key=KEY)
    prediction = torch.randn(4, 33, requires_grad=True)
    loss = fm.loss(prediction, batch)
    assert type(loss.grad_fn).__name__ == MatchingLoss.__name__ + "Backward"
    (gradient,) = torch.autograd.grad(3 * loss, prediction)
    reference = _registration.references["matching_loss"]
    arguments = (batch.x1, None, None, batch.table, None, None, KEY, 0, 3, 0, 1.0, REDUCTIONS["mean"])
    (want,) = torch.autograd.grad(3 * reference(prediction, *arguments), prediction)
    torch.testing.assert_close(gradient, want)
