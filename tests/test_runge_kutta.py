"""The Runge–Kutta ops where a kernel has branches that the samples of the contract may miss."""

import math

import pytest
import torch
from contract_op import INTERPRETED

from fmkernels import _registration
from fmkernels.ops import runge_kutta_step as step_op
from fmkernels.ops.runge_kutta_stage import stage_reference
from fmkernels.ops.runge_kutta_step import step_reference

F32, F64 = torch.float32, torch.float64
stage = torch.ops.fmkernels.runge_kutta_stage
step = torch.ops.fmkernels._runge_kutta_step_
T, T_NEXT, END, ERROR, OLDER_ERROR, T_PREVIOUS, RATIO = range(step_op.CONTROL)
STATUS, ACCEPTED, REJECTED, CURSOR, AFTER_REJECTION, RUNNING = range(step_op.COUNTERS)
MUTATED = {"y": 0, "k_first": 1, "control": 3, "counters": 4, "solution": 13}

# rows × columns on both sides of every change of method: unrolled columns, rows together, rows apart, tiles, threads
SHAPES = [(1, 1), (300, 1), (257, 2), (130, 3), (129, 4), (33, 5), (70, 31), (40, 32), (3, 257), (2, 1024), (3, 1025)]
SHAPES += [] if INTERPRETED else [(2, 16385), (2, 20011)]
KINDS = ("accepted", "rejected", "finished", "failed", "not a number", "infinite", "backward")


def settings(**given):
    names = "safety min_factor max_factor beta1 beta2 beta3 accepted_floor after_rejection_cap min_step max_step clip "
    names += "step_limit accept_at_min_step snap"
    values = dict(safety=0.9, min_factor=0.2, max_factor=10, beta1=0.2, accepted_floor=0.2, after_rejection_cap=1)
    values |= dict(max_step=math.inf, clip=1, step_limit=1000, snap=1e-3) | given
    return torch.tensor([values.get(name, 0) for name in names.split()], dtype=F64)


def problem(rows, columns, *, k=5, dtype=F32, single=False, kinds=KINDS, degree=3, **given):
    """Arguments of a step whose rows are of the kinds in turn, far from the border between accepted and rejected."""
    batch = 1 if single else rows
    ks = [torch.randn(rows, columns, dtype=F64).to(dtype) for _ in range(1 + k)]
    y = torch.randn(rows, columns, dtype=F64).to(dtype)
    control = torch.zeros(step_op.CONTROL, batch, dtype=F64)
    counters = torch.zeros(step_op.COUNTERS, batch, dtype=torch.int32)
    control[T] = torch.randn(batch, dtype=F64)
    h = 0.1 + 0.1 * torch.rand(batch, dtype=F64)
    control[ERROR:RATIO] = 0.5 + torch.rand(3, batch, dtype=F64)
    counters[STATUS] = step_op.RUNNING_STATUS
    weights = torch.randn(2 + degree, 1 + k, dtype=F64)
    weights[1] -= weights[1].mean()
    error = sum(e * k_j.double() for e, k_j in zip(weights[1], ks)).reshape(batch, rows * columns // max(batch, 1))
    rms = h * error.square().mean(-1).sqrt() if columns else h
    atol = rms / 0.3
    for row in range(batch):
        kind = kinds[row % len(kinds)]
        if kind == "rejected":
            atol[row] = rms[row] / 4
        elif kind == "finished":
            counters[STATUS, row] = step_op.DONE
        elif kind == "failed":
            counters[STATUS, row] = step_op.UNDERFLOW
            y[row] = math.nan
        elif kind in ("not a number", "infinite") and columns:
            ks[(row + 1) % (1 + k)][row, row % columns] = math.nan if kind == "not a number" else -math.inf
        elif kind == "backward":
            h[row] *= -1
    control[T_NEXT], control[END] = control[T] + h, control[T] + 3 * h
    counters[RUNNING, :1] = (counters[STATUS] == step_op.RUNNING_STATUS).sum()
    if single:
        control, counters = control[:, 0].clone(), counters[:, 0].clone()
    arguments = dict(y=y, k_first=ks[0], k=ks[1:], control=control, counters=counters, weights=weights)
    arguments |= dict(settings=settings(), rtol=torch.zeros(1, 1, dtype=F64), atol=atol.unsqueeze(1))
    arguments |= dict(segments=torch.tensor([[0, rows * columns if single else columns]]), components=1, ratio=None)
    return arguments | dict(t_eval=None, solution=None) | given


def moved(arguments, device, dtype=None):
    def move(x):
        return x.to(device, dtype if dtype and x.is_floating_point() and x.dtype != F64 else None, copy=True)

    values = arguments.values()
    return [[move(x) for x in v] if isinstance(v, list) else move(v) if torch.is_tensor(v) else v for v in values]


def outcome(function, arguments, device, dtype=None):
    values = moved(arguments, device, dtype)
    function(*values)
    return {name: values[i].cpu() for name, i in MUTATED.items() if values[i] is not None}


def largest(*tensors):
    """The largest finite magnitude."""
    return max(float(x.double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0 for x in tensors)


def size_of(arguments):
    """What the rounding of y₁ and of the dense output is relative to."""
    h = largest(arguments["control"][T_NEXT] - arguments["control"][T])
    weights = arguments["weights"].abs().sum(-1)
    weight = max(float(weights[0]), float(weights[2:].sum()))
    return largest(arguments["y"]) + h * weight * largest(arguments["k_first"], *arguments["k"])


def check(arguments, device):
    """The op against its reference; returns the op's outcome."""
    got, expected = outcome(step, arguments, device), outcome(step_reference, arguments, "cpu")
    torch.testing.assert_close(got["counters"], expected["counters"], rtol=0, atol=0)
    dtype = arguments["y"].dtype
    few = 1e-12 if dtype == F64 else 1e-5
    exact = [T, END, T_PREVIOUS]
    torch.testing.assert_close(got["control"][exact], expected["control"][exact], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got["control"], expected["control"], rtol=few, atol=few, equal_nan=True)
    torch.testing.assert_close(got["k_first"], expected["k_first"], rtol=0, atol=0, equal_nan=True)
    error = 16 * torch.finfo(F64 if dtype == F64 else F32).eps * size_of(arguments)
    for name in ("y", "solution"):
        if name in got:
            few = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
            torch.testing.assert_close(got[name], expected[name], rtol=few, atol=error, equal_nan=True)
    return got


def with_times(arguments, times=None, M=4):
    """Arguments with output times: before, at and after the end of the step, and NaN where a row has fewer."""
    control, y = arguments["control"], arguments["y"]
    if times is None:
        h = (control[T_NEXT] - control[T]).unsqueeze(-1)
        times = control[T].unsqueeze(-1) + h * torch.tensor([0.25, 0.75, 1.0, 1.5], dtype=F64)
        times[..., 2] = control[T_NEXT]
        if control.dim() > 1:
            times[1::3, 3] = math.nan
    shape = (M, *y.shape) if control.dim() == 1 else (y.shape[0], M, *y.shape[1:])
    return arguments | dict(t_eval=times, solution=torch.full(shape, -7.0, dtype=y.dtype))


# ---- the step ---------------------------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_of_every_shape(shape, dtype, device):
    """A step size each, and one for all."""
    check(with_times(problem(*shape, dtype=dtype)), device)
    for kind in ("accepted", "rejected", "not a number", "backward"):
        check(with_times(problem(*shape, dtype=dtype, single=True, kinds=(kind,))), device)


@pytest.mark.sanitize
@pytest.mark.parametrize("k", [*range(1, 15), 20])
def test_step_of_any_number_of_terms(k, device):
    for shape in ((37, 2), (3, 40), (2, 1100)):
        check(with_times(problem(*shape, k=k)), device)


@pytest.mark.skipif(INTERPRETED, reason="a hundred thousand elements")
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_long_row_is_the_same_on_any_number_of_threads(dtype, device):
    threads = torch.get_num_threads()
    try:
        for kind in ("accepted", "rejected", "infinite"):
            arguments = with_times(problem(1, 100_003, dtype=dtype, single=True, kinds=(kind,)))
            outcomes = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                outcomes.append(check(arguments, device))
            for other in outcomes[1:]:
                for name, value in other.items():
                    torch.testing.assert_close(value, outcomes[0][name], rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(20, 2), (9, 6), (3, 40), (2, 1030), (1, 4100)], ids=str)
@pytest.mark.parametrize("single", [False, True], ids=["each", "single"])
@pytest.mark.parametrize("components", [1, 2])
def test_tolerances_and_segments(shape, single, components, device):
    rows, columns = shape
    numbers = (rows * columns if single else columns) // components
    batch = 1 if single else rows
    parts = [[[0, numbers]], [[0, max(1, numbers // 3)]], [[numbers // 3, numbers]]]
    cuts = sorted({0, 1, numbers // 2, max(0, numbers - 1), numbers})
    parts += [[list(pair) for pair in zip(cuts, cuts[1:])]]
    for segments in parts:
        for tolerance_rows, tolerance_columns in ((1, 1), (batch, 1), (1, numbers), (batch, numbers)):
            arguments = problem(*shape, single=single, kinds=("accepted", "rejected"), components=components)
            arguments["atol"] = arguments["atol"].mean() * (0.5 + torch.rand(batch, 1, dtype=F64))[:tolerance_rows]
            arguments["rtol"] = 0.3 * torch.rand(tolerance_rows, tolerance_columns, dtype=F64)
            arguments["segments"] = torch.tensor(segments)
            check(arguments, device)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 2, 5, 40, 1100] + [16500] * (not INTERPRETED))
def test_a_solution_that_overflows_is_rejected(columns, dtype, device):
    """However small its error."""
    for segments in ([[0, columns]], [[0, 1]]):
        arguments = problem(3, columns, dtype=dtype, kinds=("accepted",), segments=torch.tensor(segments))
        arguments["weights"][:2] = torch.tensor([[10.0], [0.0]])
        largest_number = torch.finfo(dtype).max
        for x in (arguments["y"], arguments["k_first"], *arguments["k"]):
            x[1, -1] = 0.9 * largest_number
        got = check(arguments, device)
        assert got["counters"][ACCEPTED].tolist() == [1, 0, 1] and got["control"][RATIO, 1] == math.inf


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_given_ratios_decide(dtype, device):
    for shape in ((9, 2), (3, 40), (2, 1100)):
        arguments = problem(*shape, kinds=("accepted", "infinite", "finished", "accepted"))
        arguments["ratio"] = torch.linspace(0.1, 2.1, shape[0], dtype=dtype)
        got = check(arguments, device)
        running = arguments["counters"][STATUS] < 0
        expected = torch.where(got["control"][RATIO].isinf(), math.inf, arguments["ratio"].double())
        assert torch.equal(got["control"][RATIO][running], expected[running])
        for ratio in (0.5, 1.0, 1.5, math.nan):
            arguments = problem(*shape, single=True, kinds=("accepted",), ratio=torch.tensor(ratio, dtype=dtype))
            got = check(arguments, device)
            assert bool(got["counters"][ACCEPTED]) == (ratio <= 1)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 2, 3, 40, 1100])
def test_output_at_the_end_of_a_step_is_its_solution(columns, dtype, device):
    arguments = with_times(problem(14, columns, dtype=dtype, kinds=("accepted", "backward", "rejected", "finished")))
    got = check(arguments, device)
    accepted = got["counters"][ACCEPTED].bool()
    assert torch.equal(got["solution"][accepted, 2], got["y"][accepted])
    assert (got["solution"][~accepted] == -7).all() and (got["solution"][:, 3] == -7).all()
    assert torch.equal(got["counters"][CURSOR], 3 * accepted.int())
    # The next step goes on at the cursor: nothing written twice.
    arguments |= {name: got[name] for name in MUTATED}
    arguments["solution"] = torch.full_like(got["solution"], -8.0)
    got = check(arguments, device)
    assert (got["solution"][:, :3][accepted] == -8).all()


@pytest.mark.sanitize
def test_output_times_shared_by_the_rows(device):
    arguments = problem(12, 3, kinds=("accepted", "rejected", "finished"))
    times = torch.linspace(-0.5, 1.0, 7, dtype=F64)
    times[5] = math.nan
    got = check(with_times(arguments, times, 7), device)
    assert 0 < got["counters"][CURSOR].max() <= 6
    check(with_times(arguments, torch.zeros(0, dtype=F64), 0), device)
    for columns in (2, 40, 1100):  # NaN between times that are due
        arguments = with_times(problem(4, columns, kinds=("accepted", "rejected")))
        arguments["t_eval"][:, 1] = math.nan
        got = check(arguments, device)
        assert got["counters"][CURSOR].tolist() == [2, 0, 2, 0] and (got["solution"][:, 1] == -7).all()


def decision(ratio=0.3, t=0.0, h=0.1, end=1.0, error=1.0, older=1.0, before=(0, 0, 0), device="cpu", **given):
    """Control and counters after a step of two rows of 2 columns that a given ratio decides."""
    control = torch.tensor([t, t + h, end, error, older, -1.0, 9.0], dtype=F64).unsqueeze(1).repeat(1, 2)
    counters = torch.tensor([-1, before[0], before[1], 0, before[2], 2], dtype=torch.int32).unsqueeze(1).repeat(1, 2)
    given = dict(control=control, counters=counters, settings=settings(**given))
    got = check(problem(2, 2, kinds=("accepted",)) | given | dict(ratio=torch.full((2,), ratio, dtype=F64)), device)
    assert torch.equal(got["control"][:, 0], got["control"][:, 1])
    control, counters = got["control"][:, 0].tolist(), got["counters"][:, 0].tolist()
    return control, counters


@pytest.mark.sanitize
def test_decisions_by_hand(device):
    """Every branch of step control, against numbers worked out here."""

    def after(status=None, next_step=None, **arguments):
        control, counters = decision(device=device, **arguments)
        assert status is None or counters[STATUS] == status
        assert next_step is None or control[T_NEXT] - control[T] == pytest.approx(next_step, rel=1e-9)
        return control, counters

    plain = 0.9 * 0.3**-0.2
    running, done, limit, underflow, non_finite = -1, 0, 1, 2, 3
    control, counters = after(running, 0.1 * plain)
    assert control == pytest.approx([0.1, 0.1 + 0.1 * plain, 1.0, 0.3, 1.0, 0.0, 0.3], rel=1e-12)
    assert counters == [-1, 1, 0, 0, 0, 2]
    control, counters = after(running, 0.1 * 0.9 * 4**-0.2, ratio=4.0)
    assert control[T] == 0 and control[ERROR:RATIO] == [1.0, 1.0, -1.0] and control[RATIO] == 4
    assert counters == [-1, 0, 1, 0, 1, 2]
    # factors and their bounds
    after(
        running,
        0.1 * 0.9 * 0.3**-0.14 * 0.5**0.08 * 0.7**-0.02,
        error=0.5,
        older=0.7,
        beta1=0.14,
        beta2=-0.08,
        beta3=0.02,
    )
    after(running, 0.1 * 0.9, beta1=0)
    after(running, 1.0, ratio=0.0, end=30.0)
    after(running, 0.02, ratio=1e9)
    after(running, 0.1, ratio=0.9, accepted_floor=1.0)
    after(running, 0.1 * 0.9, ratio=1.0, accepted_floor=1.0)
    after(running, 0.1, ratio=1e-3, before=(3, 1, 1))
    after(running, 0.1 * 0.9, ratio=1.5, error=1e-3, beta2=0.5)  # a rejected step shrinks, whatever the history
    after(running, 0.1 * 0.95, ratio=1.5, error=1e-3, beta2=0.5, min_factor=0.95)
    after(underflow, ratio=1.5, safety=1, beta1=0)  # the same step again
    after(non_finite, ratio=math.nan, min_factor=1)
    after(running, 0.11, max_step=0.11, ratio=0.1)
    after(running, 0.2, min_step=0.2, ratio=0.5)
    assert after(ratio=0.0)[0][ERROR] == 2.0**-33
    assert after(ratio=0.3, error=0.6, older=0.7)[0][ERROR:T_PREVIOUS] == [0.3, 0.6]
    # not finite: smallest factor, history forgotten
    for ratio in (math.inf, math.nan, -math.inf):
        control, counters = after(running, 0.02, ratio=ratio, error=0.5, older=0.6)
        assert control[ERROR:T_PREVIOUS] == [1, 1] and control[RATIO] == math.inf and counters[REJECTED] == 1
    # the end
    control, counters = after(done, end=0.1)
    assert control[T] == control[T_NEXT] == 0.1 and counters == [0, 1, 0, 0, 0, 0]
    assert after(done, end=-0.1, h=-0.1)[0][T] == -0.1
    assert after(done, end=0.05)[0][T] == 0.1  # beyond it, unclipped
    assert after(running, end=0.2)[0][T_NEXT] == 0.2  # clipped
    assert after(running, end=0.2, clip=0)[0][T_NEXT] == pytest.approx(0.1 + 0.1 * plain)
    assert after(running, end=0.1 + 0.1 * plain * (1 + 5e-4))[0][T_NEXT] == 0.1 + 0.1 * plain * (1 + 5e-4)  # snapped
    assert after(running, end=0.1 + 0.1 * plain * (1 + 5e-3))[0][T_NEXT] == pytest.approx(0.1 + 0.1 * plain)
    end = 0.1 + 0.1 * plain + 4e-16  # within rounding
    assert after(running, end=end, snap=0)[0][T_NEXT] == end
    # the limit of steps; done goes before it
    after(running, before=(3, 5, 0), step_limit=10)
    after(limit, before=(3, 6, 0), step_limit=10)
    after(limit, before=(3, 6, 0), step_limit=9.5)
    after(limit, ratio=4.0, before=(3, 6, 0), step_limit=10)
    after(done, before=(3, 6, 0), step_limit=10, end=0.1)
    # steps too small
    after(underflow, ratio=4.0, h=0.01, min_step=0.02)
    after(non_finite, ratio=math.nan, h=0.01, min_step=0.02)
    _, counters = after(running, 0.02, ratio=4.0, h=0.01, min_step=0.02, accept_at_min_step=1)
    assert counters[ACCEPTED] == 1
    after(non_finite, ratio=math.nan, h=0.01, min_step=0.02, accept_at_min_step=1)
    after(underflow, ratio=4.0, t=1.0, h=2.0**-52, end=2.0)
    after(non_finite, ratio=math.inf, t=1.0, h=2.0**-52, end=2.0)
    after(underflow, ratio=4.0, h=2.0**-101)


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 40, 1100])
def test_rows_at_rest_keep_every_bit(columns, device):
    kinds = ("accepted", "finished", "failed", "rejected")
    arguments = with_times(problem(8, columns, kinds=kinds))
    arguments["k_first"][1::4] = math.nan
    arguments["control"][[END, ERROR, RATIO], 2] = math.nan
    got = check(arguments, device)
    still = torch.tensor([kinds[row % 4] in ("finished", "failed") for row in range(8)])
    for name in ("y", "k_first", "solution"):
        torch.testing.assert_close(got[name][still], arguments[name][still], rtol=0, atol=0, equal_nan=True)
    for name in ("control", "counters"):
        torch.testing.assert_close(got[name][:5, still], arguments[name][:5, still], rtol=0, atol=0, equal_nan=True)
    rejected = ~still & ~got["counters"][ACCEPTED].bool()
    assert torch.equal(got["y"][rejected], arguments["y"][rejected])
    assert got["counters"][RUNNING, 0] == 4
    arguments["counters"][STATUS] = step_op.DONE
    got = check(arguments, device)
    for name in ("y", "k_first", "control", "solution"):
        torch.testing.assert_close(got[name], arguments[name], rtol=0, atol=0, equal_nan=True)
    assert got["counters"][RUNNING, 0] == 0


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [1, 3, 40, 1100])
def test_step_of_a_row_alone(columns, device):
    arguments = with_times(problem(7, columns))
    whole = outcome(step, arguments, device)
    for row in range(7):
        one = slice(row, row + 1)
        by_row = ("y", "k_first", "atol", "t_eval", "solution")
        part = {name: arguments[name][one] for name in by_row}
        part |= dict(k=[k_j[one] for k_j in arguments["k"]])
        part |= {name: arguments[name][:, one].contiguous() for name in ("control", "counters")}
        alone = outcome(step, arguments | part, device)
        assert torch.equal(alone["counters"][:RUNNING, 0], whole["counters"][:RUNNING, row])
        torch.testing.assert_close(alone["control"][:, 0], whole["control"][:, row], rtol=1e-5, atol=0, equal_nan=True)
        for name in ("y", "k_first", "solution"):
            torch.testing.assert_close(alone[name][0], whole[name][row], rtol=1e-5, atol=1e-5, equal_nan=True)


def unaligned(x):
    """A contiguous tensor that begins one element into its memory."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    out = memory[1:].view(x.shape)
    out.copy_(x)
    return out


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [2, 5, 40, 1100])
def test_step_of_unaligned_and_strided_data(columns):
    """On the CPU, where the arguments go as they are."""
    arguments = with_times(problem(6, columns))
    expected = outcome(step, arguments, "cpu")
    values = [unaligned(x) if torch.is_tensor(x) else x for x in moved(arguments, "cpu")]
    values[2] = [torch.stack([k_j, k_j], -1)[..., 0] for k_j in values[2]]
    values[7] = values[7].expand(6, columns)
    step(*values)
    for name, i in MUTATED.items():
        torch.testing.assert_close(values[i], expected[name], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(0, 3), (300, 0), (0, 0)], ids=str)
def test_step_of_nothing(shape, device):
    check(with_times(problem(*shape, kinds=("accepted",))), device)


@pytest.mark.parametrize("name", ["y", "k_first", "control", "counters", "solution"])
def test_overwritten_tensors_must_be_contiguous(name):
    """A kernel that cannot write where it is told must not write elsewhere."""
    if _registration.answering("_runge_kutta_step_", "cpu") != "cpp":
        return
    values = moved(with_times(problem(6, 4)), "cpu")
    strided = values[MUTATED[name]]
    values[MUTATED[name]] = torch.stack([strided, strided], -1)[..., 0]
    with pytest.raises(RuntimeError, match=f"{name}: expected contiguous"):
        step(*values)


# ---- the stage --------------------------------------------------------------------------------------------------


def check_stage(device, y, k, times, index=0, coefficients=None, row=0, nudge=0):
    if coefficients is None:
        coefficients = torch.randn(2, 1 + len(k), dtype=F64)
    arguments = (y, k, times, index, coefficients, row, nudge)
    there = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), arguments)
    got, expected = stage(*there), stage_reference(*arguments)
    h, size = largest(times[index + 1] - times[index]), largest(y, *k)
    eps = torch.finfo(expected[1].dtype).eps
    few = torch.finfo(y.dtype).eps if y.dtype.itemsize == 2 else 0
    slack = 8 * eps * size * (1 + h * float(coefficients[row, 1:].abs().sum()))
    torch.testing.assert_close(got[0].cpu(), expected[0], rtol=few, atol=slack)
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=2 * eps, atol=2 * eps)
    return got[0].cpu(), got[1].cpu()


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (300, 0)], ids=str)
def test_stage_of_every_shape(shape, dtype, device):
    y, *k = (torch.randn(shape, dtype=F64).to(dtype) for _ in range(6))
    check_stage(device, y, k, torch.randn(3, shape[0], dtype=F64), 1)
    check_stage(device, y, k, torch.randn(3, dtype=F64), 1)


@pytest.mark.sanitize
@pytest.mark.parametrize("terms", [*range(16), 20])
def test_stage_of_any_number_of_terms(terms, device):
    for shape in ((37, 2), (3, 40), (2, 1100)):
        y, *k = (torch.randn(shape) for _ in range(1 + terms))
        check_stage(device, y, k, torch.randn(2, shape[0], dtype=F64), row=1)


@pytest.mark.sanitize
@pytest.mark.parametrize("columns", [2, 40])
def test_stage_times(columns, device):
    y, k = torch.randn(5, columns), [torch.randn(5, columns)]
    times = torch.tensor([[0.0, 0.1, -1.0, 2.0, 3.0], [0.3, 0.7, -3.0, 2.0, 3.1]], dtype=F64)
    last = torch.tensor([[1.0, 0.5]], dtype=F64)
    assert torch.equal(check_stage(device, y, k, times, coefficients=last)[1], times[1].float())
    zero = torch.tensor([[0.0, 0.5]], dtype=F64)
    assert torch.equal(check_stage(device, y, k, times, coefficients=zero)[1], times[0].float())
    directions = torch.copysign(torch.full((5,), math.inf), (times[1] - times[0]).float())
    for nudge in (-1, 1):
        got = check_stage(device, y, k, times, coefficients=last, nudge=nudge)[1]
        assert torch.equal(got, torch.nextafter(times[1].float(), nudge * directions))
    shared = check_stage(device, y, k, times[:, 0].clone(), coefficients=last, nudge=-1)[1]
    assert shared.shape == () and float(shared) < 0.3


@pytest.mark.sanitize
def test_stage_of_unaligned_and_strided_data():
    for columns in (2, 40, 1100):
        y, *k = (torch.randn(6, columns) for _ in range(4))
        times, coefficients = torch.randn(7, 6, dtype=F64), torch.randn(3, 4, dtype=F64)
        expected = stage(y, k, times, 2, coefficients, 1, 0)
        strided = torch.stack([times, times], -1)[..., 0], torch.stack([coefficients, coefficients], -1)[..., 1]
        k = [k[0].t().contiguous().t(), unaligned(k[1]), torch.stack([k[2], k[2]], -1)[..., 1]]
        got = stage(unaligned(y), k, strided[0], 2, strided[1], 1, 0)
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
