"""The guided Euler step: closed forms, both ends of the guidance, rescaling, dtypes, gradients, and each bad input."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fmkernels import _registration
from fmkernels.ops import guided_euler

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
X, C, U = torch.randn(3, 4, 5)
NAN, INF = float("nan"), float("inf")
SHAPES = [(3, 7), (5, 2), (2, 3, 700), (2, 40_001)]  # short rows, rows of one task, a row of several


def inputs(shape, device, dtype=F32, velocity=None):
    data = torch.randn(3, *shape, dtype=F64)
    return tuple(value.to(device, kind) for value, kind in zip(data, (dtype, velocity or dtype, velocity or dtype)))


def rescaled(c, v, phi):
    """Lin et al., equations 15 and 16, in fp64."""
    dims = tuple(range(1, v.dim()))
    return phi * v * (c.std(dims, keepdim=True) / v.std(dims, keepdim=True)) + (1 - phi) * v


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_closed_form(shape, phi, device):
    """Against torch's own std, h and w a number, one tensor, or one a row."""
    x, c, u = inputs(shape, device)
    wide = [value.double() for value in (x, c, u)]
    rows = (shape[0], *[1] * (len(shape) - 1))
    for h, w in (
        (-0.3, 3.5),
        (torch.tensor(0.2), torch.tensor(2.5, dtype=F64)),
        (torch.rand(2, shape[0]) * 4).unbind(),
    ):
        if isinstance(h, torch.Tensor):
            h, w = h.to(device), w.to(device)
        column = [value.double().expand(shape[0]).reshape(rows) if isinstance(value, torch.Tensor) else value
                  for value in (h, w)]  # fmt: skip
        v = wide[2] + column[1] * (wide[1] - wide[2])
        want = wide[0] + column[0] * (rescaled(wide[1], v, phi) if phi else v)
        torch.testing.assert_close(guided_euler(x, c, u, h, w, phi).double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_ends_of_guidance_are_exact(shape, dtype, device):
    """w = 0 is the unconditional velocity and w = 1 the conditional one, to the bit, though they differ in size."""
    _, c, u = inputs(shape, device, dtype)
    c, x = c * 1000, torch.zeros_like(c)
    ones = torch.ones(shape[0], device=device)
    for w, want in ((0.0, u), (1.0, c), (0 * ones, u), (ones, c)):
        assert torch.equal(guided_euler(x, c, u, 1.0, w), want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_rescaling_keeps_the_std_of_the_conditional(shape, device):
    x, c, u = inputs(shape, device, F64)
    v = guided_euler(torch.zeros_like(x), c, u, 1.0, 9.0, 1.0)
    torch.testing.assert_close(v.flatten(1).std(1), c.flatten(1).std(1), rtol=1e-10, atol=0)
    plain = guided_euler(torch.zeros_like(x), c, u, 1.0, 9.0)
    torch.testing.assert_close(v / v.flatten(1)[:, :1].reshape(-1, *[1] * (x.dim() - 1)),
                               plain / plain.flatten(1)[:, :1].reshape(-1, *[1] * (x.dim() - 1)))  # fmt: skip


@pytest.mark.parametrize("size", [1024, 16384, 40_001])
def test_std_of_rows_far_from_zero(size, device):
    """The spread is taken about the mean: sums of squares would have lost it."""
    c, u = (300 + torch.randn(2, 2, size, dtype=F64)).float().to(device)
    v = u.double() + 5 * (c.double() - u.double())
    got = guided_euler(torch.zeros_like(c), c, u, 1.0, 5.0, 1.0).double()
    torch.testing.assert_close(got, rescaled(c.double(), v, 1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_constant_velocity_is_left_as_it_is(shape, device):
    x, c, _ = inputs(shape, device)
    u = torch.full_like(x, 0.1)
    for w, conditional in ((0.0, c), (7.3, u)):
        assert torch.equal(guided_euler(0 * x, conditional, u, 1.0, w, 0.8), u)
    c = c.requires_grad_()
    guided_euler(x, c, u, 1.0, 0.0, 0.8).sum().backward()
    assert c.grad.isfinite().all()


def test_a_row_that_is_not_finite_stays_alone(device):
    x, c, u = inputs((3, 40_001), device)
    c[1, 7] = NAN
    out = guided_euler(x, c, u, 0.1, 4.0, 0.7)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    torch.testing.assert_close(out[[0, 2]], guided_euler(x[[0, 2]], c[[0, 2]], u[[0, 2]], 0.1, 4.0, 0.7))


@pytest.mark.parametrize("dtype,velocity", [(F32, BF16), (F32, F16), (BF16, F32), (F64, BF16), (F16, F16), (F32, F64)])
@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_state_and_velocities_of_other_dtypes(dtype, velocity, phi, device):
    """Computed wide, rounded once to x's dtype."""
    x, c, u = inputs((3, 2050), device, dtype, velocity)
    out = guided_euler(x, c, u, 0.5, 2.0, phi)
    wide = [value.double() for value in (x, c, u)]
    want = guided_euler(*wide, 0.5, 2.0, phi)
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 + 1e-6 * (dtype != F64)
    torch.testing.assert_close(out.double(), want, rtol=1.01 * rounding, atol=2e-6)


def test_steps_of_two_rows_differ():
    """Nothing of a row's h or w reaches its neighbour, whatever the length of rows."""
    for columns in (1, 2, 3, 4, 5, 300, 20_000):
        x, c, u = torch.zeros(3, 5, columns)
        h, w = torch.tensor([0.0, 1, 2, 3, 4], dtype=F64), torch.tensor([1.0, 0, 1, 0, 0.25])
        c, u = c + 1, u + 2
        want = (h * torch.tensor([1.0, 2, 1, 2, 1.75])).float()[:, None].expand(5, columns)
        assert torch.equal(guided_euler(x, c, u, h, w), want)


@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape, device):
    x, c, u = inputs(shape, device, F32, BF16)
    h = torch.rand(shape[0], device=device)
    for phi in (0.0, 0.5) if 0 not in shape[1:] else (0.0,):
        out = guided_euler(x, c, u, h, 3.0, phi)
        assert out.shape == shape and out.dtype == F32


def test_a_new_tensor_comes_out(device):
    x, c, u = inputs((4, 3), device)
    before = [value.clone() for value in (x, c, u)]
    out = guided_euler(x, c, u, 0.0, 1.0)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
    out.zero_()
    assert all(torch.equal(a, b) for a, b in zip((x, c, u), before))


@pytest.mark.parametrize("phi", [0.0, 0.7], ids=["plain", "rescaled"])
@pytest.mark.parametrize("by_row", [False, True], ids=["one", "rows"])
def test_gradients(phi, by_row, device):
    x, c, u = inputs((2, 3, 2), device, F64)
    h, w = torch.tensor([[0.3, -0.2], [0.2, 4.0]], dtype=F64, device=device)
    leaves = [value.clone().requires_grad_() for value in (x, c, u, *((h, w) if by_row else (h[0], w[1])))]

    def step(*values):
        return guided_euler(*values, phi)

    assert gradcheck(step, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(step, leaves)


def test_gradients_without_rescaling_are_these(device):
    """∂/∂x = 1, ∂/∂v_c = hw, ∂/∂v_u = h(1 − w), ∂/∂h = Σ v, ∂/∂w = h Σ (v_c − v_u), in the inputs' own dtypes."""
    x, c, u = (value.requires_grad_() for value in inputs((3, 5), device, F32, BF16))
    h, w = (torch.rand(3, dtype=F64, device=device).requires_grad_() for _ in range(2))
    guided_euler(x, c, u, h, w).sum().backward()
    column = [value.detach()[:, None].expand(3, 5) for value in (h, w)]
    v = u.double() + column[1] * (c.double() - u.double())
    wants = (torch.ones(3, 5), column[0] * column[1], column[0] * (1 - column[1]), v.sum(1),
             h * (c.double() - u.double()).sum(1))  # fmt: skip
    for leaf, want in zip((x, c, u, h, w), wants):
        assert leaf.grad.dtype == leaf.dtype
        tolerance = 1e-2 if leaf.dtype == BF16 else 1e-5
        torch.testing.assert_close(leaf.grad.double(), want.double().to(device), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("which", range(5), ids=["x", "conditional", "unconditional", "h", "scale"])
def test_one_input_alone_has_its_gradient(which, device):
    x, c, u = inputs((3, 5), device)
    arguments = [x, c, u, torch.rand(3, device=device), torch.rand(3, device=device)]
    gradients = []
    for wanted in (range(5), (which,)):
        leaves = [value.detach().requires_grad_(i in wanted) for i, value in enumerate(arguments)]
        guided_euler(*leaves, 0.5).square().sum().backward()
        gradients.append(leaves[which].grad)
    assert torch.equal(*gradients)


def test_no_graph_where_none_is_asked_for(device):
    x, c, u = inputs((4, 3), device)
    c.requires_grad_()
    with torch.no_grad():
        assert not guided_euler(x, c, u, 0.1, 2.0).requires_grad
    with torch.inference_mode():
        plain = guided_euler(x, c, u, 0.1, 2.0)
    assert guided_euler(x, c, u, 0.1, 2.0).requires_grad
    torch.testing.assert_close(plain.clone(), guided_euler(x, c, u, 0.1, 2.0).detach())


@pytest.mark.compiles
def test_one_graph_for_every_step_size_and_guidance():
    """A number that changes from call to call is compiled for at most twice, fixed and free."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(guided_euler, fullgraph=True, backend=backend)
    for i in range(6):
        h, w = 0.1 * i - 0.2, 1.5 * i
        torch.testing.assert_close(step(X, C, U, h, w), guided_euler(X, C, U, h, w))
    assert len(graphs) <= 2


def test_one_op_call_for_a_step(device):
    """Nothing but the op runs without gradients: no tensors are made of numbers, nothing is cast or copied."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    (x, c, u), scale = inputs((4, 3), device, F32, BF16), torch.ones(4, device=device)
    with Record():
        guided_euler(x, c, u, 0.1, scale, 0.5)
    assert called == [_registration.overload("guided_euler")]


CASES = [
    ((None, C, U, 0.1, 1.0), TypeError, "x: expected a torch.Tensor, got NoneType"),
    ((X, [1.0], U, 0.1, 1.0), TypeError, "conditional: expected a torch.Tensor, got list"),
    ((X, C, 2.0, 0.1, 1.0), TypeError, "unconditional: expected a torch.Tensor, got float"),
    ((X.long(), C, U, 0.1, 1.0), TypeError, "x: expected dtype float32, .*, got int64"),
    ((X, C.to(torch.complex64), U, 0.1, 1.0), TypeError, "conditional: expected dtype float32, .*, got complex64"),
    ((X, C, U.bool(), 0.1, 1.0), TypeError, "unconditional: expected dtype float32, .*, got bool"),
    ((X, C[:2], U, 0.1, 1.0), ValueError, r"conditional: expected shape \[4, 5\], that of x, got \[2, 5\]"),
    ((X, C, U[None], 0.1, 1.0), ValueError, r"unconditional: expected shape \[4, 5\], that of x, got \[1, 4, 5\]"),
    ((X, C, U.half(), 0.1, 1.0), TypeError, "unconditional: expected dtype float32, that of conditional, got float16"),
    ((X, C.to("meta"), U, 0.1, 1.0), ValueError, "conditional: expected device cpu, that of x, got meta"),
    ((X, C, U, "0.1", 1.0), TypeError, "h: expected a real number, got str"),
    ((X, C, U, True, 1.0), TypeError, "h: expected a real number, got bool"),
    ((X, C, U, NAN, 1.0), ValueError, "h: expected a finite number, got nan"),
    ((X, C, U, 0.1, INF), ValueError, "scale: expected a finite number, got inf"),
    ((X, C, U, 0.1, None), TypeError, "scale: expected a real number, got NoneType"),
    ((X, C, U, torch.rand(4).bfloat16(), 1.0), TypeError, "h: expected a number, .* float32 or float64, got bfloat16"),
    ((X, C, U, torch.tensor(1), 1.0), TypeError, "h: expected a number, .* float32 or float64, got int64"),
    ((X, C, U, 0.1, torch.rand(4).half()), TypeError, "scale: expected a number, .* float32 or float64, got float16"),
    ((X, C, U, torch.rand(5), 1.0), ValueError, r"h: expected shape \[\] or \[4\], one a row of x, got \[5\]"),
    ((X, C, U, torch.rand(4, 1), 1.0), ValueError, r"h: expected shape \[\] or \[4\], one a row of x, got \[4, 1\]"),
    ((X, C, U, 0.1, torch.rand(1)), ValueError, r"scale: expected shape \[\] or \[4\], one a row of x, got \[1\]"),
    ((X, C, U, torch.rand(4, device="meta"), 1.0), ValueError, "h: expected device cpu, that of x, got meta"),
    ((X, C, U, 0.1, 1.0, 1.5), ValueError, "rescale: expected a finite number of at least 0 and at most 1, got 1.5"),
    ((X, C, U, 0.1, 1.0, -0.1), ValueError, "rescale: expected a finite number of at least 0 and at most 1, got -0.1"),
    ((X, C, U, 0.1, 1.0, NAN), ValueError, "rescale: expected a finite number of at least 0 and at most 1, got nan"),
    ((X, C, U, 0.1, 1.0, torch.tensor(0.5)), TypeError, "rescale: expected a real number, got Tensor"),
    ((X, C, U, 0.1, 1.0, False), TypeError, "rescale: expected a real number, got bool"),
    ((X[:, :1], C[:, :1], U[:, :1], 0.1, 1.0, 0.5), ValueError, r"rescale: expected at least 2 .* got shape \[4, 1\]"),
    ((X[0], C[0], U[0], 0.1, 1.0, 0.5), ValueError, r"rescale: expected at least 2 elements a row .* got shape \[5\]"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CASES, ids=map(str, range(len(CASES))))
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        guided_euler(*arguments)


def test_integers_and_scalar_states_are_taken():
    assert torch.equal(guided_euler(X, C, U, 0, 1), X)
    assert guided_euler(X[0, 0], C[0, 0], U[0, 0], torch.tensor(1.0), 0.0) == X[0, 0] + U[0, 0]
