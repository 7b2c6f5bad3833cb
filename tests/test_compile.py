"""Under torch.compile: whole steps without recompiles, compiled transforms, Inductor, and the same keys as eager."""

import pytest
import torch
from contract import NOISE, OPS
from test_gradients import function_of, scalar

import fmkernels as fmk
from fmkernels.ops.noise import noise_reference

pytestmark = [pytest.mark.compiles, pytest.mark.slow]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class Learnable(torch.nn.Module):
    """α = t^(e^a), σ = 1 − b·t."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(0.2)), torch.nn.Parameter(torch.tensor(0.9))

    def forward(self, t):
        return t ** self.a.exp(), 1 - self.b * t


STEPS = {
    "recompute": lambda: fmk.FlowMatching(timesteps=fmk.LogitNormal(), noise="recompute"),
    "stratified": lambda: fmk.FlowMatching(fmk.VP(), timesteps=fmk.Mode(stratified=True), noise="store"),
    "learnable": lambda: fmk.FlowMatching(fmk.Custom(Learnable()), prediction="noise", rho="pseudo_huber"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_compiles_once(name, device):
    """One graph for any batch size, offset and seed, with the key drawn inside: x_t, loss and gradients as eager."""
    fm = STEPS[name]().to(device)
    model = torch.nn.Linear(6, 6, device=device)
    parameters = [*model.parameters(), *fm.parameters()]

    def step(x1, mask, first_row):
        batch = fm.sample(x1, first_row=first_row, total_rows=100)
        return batch.x_t, batch.t, batch.key, fm.loss(model(batch.x_t), batch, mask=mask)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")  # a recompile would raise
    for size, first_row in ((5, 12), (9, 14), (33, 40)):
        x1, mask = torch.randn(size, 6, device=device), torch.rand(size, 6, device=device) < 0.7
        results = []
        for call in (step, compiled):
            torch.manual_seed(size)
            *outputs, loss = call(x1, mask, first_row)
            results.append((*outputs, loss, *torch.autograd.grad(loss, parameters)))
        assert results[0][2].equal(results[1][2])  # the key
        for eager, ours in zip(*results):
            torch.testing.assert_close(ours, eager)


# The first and the last function of an op: given and drawn noise; two penalties, reductions and masks.
TRANSFORMED = [(op, found[i].name) for op in OPS if (found := op.functions(torch.device("cpu"))) for i in (0, -1)]


@pytest.mark.parametrize(("op", "name"), TRANSFORMED, ids=[f"{op.name}-{name}" for op, name in TRANSFORMED])
def test_compiled_transforms_equal_eager_ones(op, name, device):
    """jvp, grad, vmap, jacrev and hessian in one graph; the tangent is not zero."""
    call, inputs = function_of(op, name, device)
    call, inputs = scalar(call), tuple(value.detach() for value in inputs)
    tangents = tuple(torch.randn_like(value) for value in inputs)

    def transforms(inputs, tangents):
        stacked = tuple(torch.stack([value, 0.9 * value]) for value in inputs)
        return (
            torch.func.jvp(call, inputs, tangents)[1],
            torch.func.grad(call)(*inputs),
            torch.vmap(torch.func.grad(call))(*stacked),
            torch.func.jacrev(call)(*inputs),
            torch.func.hessian(call)(*inputs),
        )

    eager = transforms(inputs, tangents)
    assert eager[0].abs() > 1e-3
    compiled = torch.compile(transforms, fullgraph=True, backend="aot_eager")(inputs, tangents)
    for ours, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_inductor(op, device):
    covered = [op.levels(labels, shape=((3, 7), 1)) for labels in op.cover()]
    covered = [levels for levels in covered if op.valid(levels)]
    levels = covered[len(covered) // 2]
    arguments = op.make(levels, device)

    def call(*arguments):
        outputs = op.run(arguments)
        return tuple(output * 2 for output in outputs)

    for ours, want in zip(torch.compile(call, fullgraph=True)(*arguments), call(*arguments), strict=True):
        torch.testing.assert_close(ours, want, equal_nan=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_key_equals_eager_key(backend, device):
    compiled = torch.compile(lambda: fmk.key(device), fullgraph=True, backend=backend)
    for seed in (0, 1):
        torch.manual_seed(seed)
        eager = [fmk.key(device), fmk.key(device)]
        torch.manual_seed(seed)
        assert [compiled(), compiled()] == eager


def test_reference_under_inductor_equals_eager(device):
    """Inductor's C++ leaves int64 overflow undefined: the generator's products must not overflow."""
    arguments = NOISE.make(NOISE.levels(NOISE.cover()[0], shape=((5, 7), 1), key=-1, distribution="normal"), device)
    compiled = torch.compile(noise_reference, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), noise_reference(*arguments), rtol=1e-5, atol=1e-6)
    words = (*arguments[:-2], 1, torch.float64)
    torch._dynamo.reset()
    assert torch.compile(noise_reference, fullgraph=True)(*words).equal(noise_reference(*words))
