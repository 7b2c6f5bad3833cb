"""Wrong-by-design traps of training heads, each shut by a test of its own."""

import contextlib
import math

import pytest
import torch
from contract_op import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fmkernels as fmk
from fmkernels import _registration
from fmkernels.ops import matching_loss

pytestmark = pytest.mark.usefixtures("poison")
NOISE_MODES = ("recompute", "store")


def head(device, shape=(6, 37), dtype=torch.float32, **options):
    """A model description, a batch of it and a prediction that requires grad."""
    fm = fmk.FlowMatching(**options)
    batch = fm.sample(torch.randn(shape, device=device).to(dtype), key=torch.tensor([11], device=device))
    return fm, batch, torch.randn(shape, device=device).to(dtype).requires_grad_()


def velocity_gradient(prediction, batch, x0):
    """∂ mean (v − (x1 − x0))² / ∂v in fp64: the CondOT formula by hand."""
    residual = prediction.detach().double() - (batch.x1.double() - x0.double())
    return 2 * residual / residual.numel()


def stored_gradient(loss):
    """What the forward keeps for the backward."""
    return loss.grad_fn.saved_tensors[-1]


def test_derivatives_in_time_do_not_vanish_at_the_ends(monkeypatch):
    """torch.clamp's are 0 there from torch 2.14 on, and here at any."""
    clamp = torch.Tensor.clamp

    def later(x, low=None, high=None):
        return torch.where((x > low) & (x < high), x, clamp(x.detach(), low, high))

    monkeypatch.setattr(torch.Tensor, "clamp", later)
    data = torch.tensor([[0.3, -0.7], [1.1, 0.4]], dtype=torch.float64)
    exact = fmk.MarginalField(data, fmk.CondOT(0.2))
    x = data + 0.1
    field = fmk.FlowMatching(fmk.Cosine(), prediction="data").velocity(lambda x, t: x * t[:, None])
    fm = fmk.FlowMatching(fmk.CondOT(0.2))
    key, x0 = torch.tensor([3]), torch.randn(2, 2, dtype=torch.float64)
    calls = {
        "log_prob": lambda t: exact.log_prob(t, x),
        "velocity": lambda t: exact(t, x),
        "data": lambda t: field(t, x),
        "x_t": lambda t: fm.sample(data, x0, t, key).x_t,
    }
    for name, call in calls.items():
        for end, within in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
            if name == "data" and end == 1.0:
                continue  # its field ends before
            found = []
            for t in (end, within):
                t = torch.full((2,), t, dtype=torch.float64, requires_grad=True)
                (of_back,) = torch.autograd.grad(call(t).sum(), t)
                of_forward = torch.func.jvp(call, (t.detach(),), (torch.ones(2, dtype=torch.float64),))[1]
                torch.testing.assert_close(of_forward.reshape(2, -1).sum(1), of_back)
                found.append(of_back)
            assert found[0].abs().max() > 1e-3, name
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_retain_graph_twice_with_different_scales(device):
    fm, batch, prediction = head(device)
    loss = fm.loss(prediction, batch)
    (first,) = torch.autograd.grad(3 * loss, prediction, retain_graph=True)
    (second,) = torch.autograd.grad(5 * loss, prediction, retain_graph=True)
    (last,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(first, 3 * last)
    torch.testing.assert_close(second, 5 * last)


def test_backward_again_without_retain_graph_raises(device):
    fm, batch, prediction = head(device)
    loss = fm.loss(prediction, batch)
    (7 * loss).backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_of_incoming_gradients(reduction, device):
    """One vmapped backward of a graph that is not kept."""
    fm, batch, prediction = head(device)
    loss = fm.loss(prediction, batch, reduction=reduction)
    scales = torch.rand(3, *loss.shape, device=device)
    expected = [torch.autograd.grad(loss, prediction, scale, retain_graph=True)[0] for scale in scales]
    (batched,) = torch.autograd.grad(loss, prediction, scales, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(expected))
    loss = fm.loss(prediction, batch, reduction=reduction)
    batched = torch.vmap(lambda scale: torch.autograd.grad(loss, prediction, scale)[0])(scales)
    torch.testing.assert_close(batched, torch.stack(expected))


def test_grad_scaler_in_fp16(device):
    """Scaled by 65536 a mean's gradient is well inside fp16, but divided by the count first it would underflow."""
    shape = (16, 8192) if INTERPRETED else (64, 8192)
    x1, x0 = torch.randn(shape, device=device).half(), torch.randn(shape, device=device).half()
    fm = fmk.FlowMatching()
    batch = fm.sample(x1, x0)
    prediction = torch.nn.Parameter(x1.float() - x0.float() + 0.05 * torch.randn(shape, device=device))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    scaler.scale(fm.loss(prediction.half(), batch)).backward()
    optimizer = torch.optim.SGD([prediction])
    scaler.unscale_(optimizer)
    exact = velocity_gradient(prediction.half(), batch, x0)
    assert exact.abs().median() < 2**-18  # the trap is there: fp16 has few bits left below 2⁻¹⁴
    error = (prediction.grad.double() - exact).norm() / exact.norm()
    assert error < 1e-3
    early = (exact.half() * 2.0**16).double() / 2**16  # what dividing early gives
    assert (early - exact).norm() / exact.norm() > 1e-2


@pytest.mark.parametrize("noise", NOISE_MODES)
def test_autocast_with_a_half_prediction_and_full_data(noise, device):
    fm = fmk.FlowMatching(noise=noise)
    model = torch.nn.Linear(16, 16, device=device)
    batch = fm.sample(torch.randn(32, 16, device=device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        prediction = model(batch.x_t)
        loss = fm.loss(prediction, batch)
    assert prediction.dtype == torch.bfloat16 and loss.dtype == torch.float32 and batch.x_t.dtype == torch.float32
    loss.backward()
    gradient = model.weight.grad.clone()
    model.zero_grad()
    fm.loss(model(batch.x_t), batch).backward()
    assert gradient.dtype == torch.float32
    assert (gradient - model.weight.grad).norm() / model.weight.grad.norm() < 0.02


@pytest.mark.parametrize("masked", [False, True])
def test_per_row_gradients_of_none(masked, device):
    """Each row's loss, weighted by its own scale, is divided by its own count."""
    fm, batch, prediction = head(device, noise="store")
    mask = torch.rand(prediction.shape, device=device) < 0.6 if masked else None
    scale = torch.rand(6, device=device) + 0.5
    loss = fm.loss(prediction, batch, mask=mask, reduction="none")
    (gradient,) = torch.autograd.grad(loss, prediction, scale)
    kept = torch.ones_like(prediction) if mask is None else mask.float()
    residual = (prediction - (batch.x1 - batch.x0)).detach()
    expected = 2 * residual * kept * (scale / kept.sum(1))[:, None]
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss.detach(), (residual**2 * kept).sum(1) / kept.sum(1))


def test_gradient_of_a_masked_mean(device):
    fm, batch, prediction = head(device, noise="store")
    mask = torch.zeros(6, 1, dtype=torch.bool, device=device)
    mask[1:3] = True
    (gradient,) = torch.autograd.grad(4 * fm.loss(prediction, batch, mask=mask), prediction)
    residual = (prediction - (batch.x1 - batch.x0)).detach()
    torch.testing.assert_close(gradient, 8 * residual * mask / (2 * 37))


def test_create_graph_gives_the_second_derivative(device):
    fm, batch, prediction = head(device, shape=(3, 5), dtype=torch.float64)
    loss = fm.loss(prediction, batch)
    (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
    (hessian_row,) = torch.autograd.grad(gradient[1, 2], prediction)
    expected = torch.zeros_like(prediction)
    expected[1, 2] = 2 / 15
    torch.testing.assert_close(hessian_row, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_leaf_keeps_the_stored_gradient_itself(dtype, device):
    fm, batch, prediction = head(device, dtype=dtype)
    loss = fm.loss(prediction, batch)
    address = stored_gradient(loss).data_ptr()
    (2 * loss).backward()
    assert prediction.grad.data_ptr() == address


def test_scale_one_leaves_the_stored_gradient_untouched(device):
    fm, batch, prediction = head(device)
    loss = fm.loss(prediction, batch)
    stored = stored_gradient(loss).clone()
    loss.backward()
    assert prediction.grad.equal(stored)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nan_outside_the_mask_stays_there(reduction, device):
    """In the prediction, the data and a given x0: it reaches neither loss nor any gradient."""
    shape = (4, 6, 5)
    mask = torch.rand(4, 6, 1, device=device) < 0.5
    x1, x0, prediction = (torch.randn(shape, device=device) for _ in range(3))
    key = torch.tensor([5], device=device)
    table = fmk.ops.sample_path(x1, key=key).table

    def gradients(fill, fused):
        tensors = [value.masked_fill(~mask, fill).requires_grad_() for value in (prediction, x1, x0)]
        leaves = tensors[:1] if fused else [*tensors, table.clone().requires_grad_()]
        p, x, source = tensors if not fused else (tensors[0], tensors[1].detach(), tensors[2].detach())
        coefficients = table if fused else leaves[-1]
        loss = matching_loss(p, x, coefficients, source, key=key, mask=mask, reduction=reduction)
        assert fused == ("MatchingLoss" in type(loss.grad_fn).__name__)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    for fused in (True, False):
        clean, dirty = gradients(0.0, fused), gradients(math.nan, fused)
        for a, b in zip(clean, dirty):
            assert not b.isnan().any()
            torch.testing.assert_close(a, b)


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor's value is read on the host; looks inside the references."""

    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_to_copy")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        moves = name != "_to_copy" or (kwargs or {}).get("device") is not None
        assert name not in self.READS or not moves, f"{func} waits for the device"
        reference = _registration.references.get(name)
        if func.namespace == "fmkernels" and _registration.answering(name, args[0].device.type) == "reference":
            with self:
                return reference(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def cuda_sync_is_an_error(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("noise", NOISE_MODES)
def test_no_value_is_read_on_the_host(noise, stratified, device):
    fm = fmk.FlowMatching(fmk.SchrodingerBridge(0.3), timesteps=fmk.LogitNormal(stratified=stratified), noise=noise)
    x1 = torch.randn(6, 37, device=device)
    mask = torch.rand(6, 37, device=device) < 0.5
    prediction = torch.randn(6, 37, device=device, requires_grad=True)
    weight = torch.rand(6, device=device)
    fm.loss(prediction, fm.sample(x1)).backward()  # load and compile what is needed
    with NoHostRead(), cuda_sync_is_an_error(device):
        batch = fm.sample(x1)
        fm.loss(prediction, batch).backward()
        fm.loss(prediction, batch, mask=mask, weight=weight, reduction="none").sum().backward()


def test_the_host_read_detector_detects(device):
    with NoHostRead(), pytest.raises(AssertionError, match="waits"):
        torch.ones((), device=device).item()


def peak_memory(run, device) -> int:
    """The largest sum of what torch allocated, beyond what was held before; in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize(("dtype", "noise", "tensors"), [
    (torch.float32, "recompute", 2),
    (torch.bfloat16, "recompute", 2),
    (torch.float32, "store", 3),
])  # fmt: skip
def test_peak_memory_is_x_t_and_the_gradient(dtype, noise, tensors, device):
    if INTERPRETED or _registration.answering("sample_path", device.type) == "reference":
        pytest.skip("a property of the kernels: references and the Triton interpreter hold every intermediate")
    fm = fmk.FlowMatching(noise=noise)
    x1 = torch.randn(64, 16384, device=device).to(dtype)
    prediction = torch.randn(64, 16384, device=device).to(dtype).requires_grad_()

    def step():
        batch = fm.sample(x1)
        loss = 2 * fm.loss(prediction, batch)
        loss.backward()
        return batch, loss

    step()
    prediction.grad = None
    size = x1.numel() * x1.element_size()
    peak = peak_memory(step, device)
    assert tensors * size <= peak < (tensors + 0.05) * size, f"{peak / size:.2f} times the batch"


@pytest.mark.parametrize("noise", NOISE_MODES)
def test_checkpointing_with_the_key_drawn_outside(noise, device):
    fm = fmk.FlowMatching(noise=noise, timesteps=fmk.LogitNormal())
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 8)).to(device)
    x1, key = torch.randn(16, 8, device=device), fmk.key(device)

    def step(x1, key):
        batch = fm.sample(x1, key=key)
        return fm.loss(model(batch.x_t), batch)

    plain = torch.autograd.grad(step(x1, key), list(model.parameters()))
    recomputed = torch.autograd.grad(checkpoint(step, x1, key, use_reentrant=False), list(model.parameters()))
    for a, b in zip(plain, recomputed):
        assert a.equal(b)


SPLIT = {
    "one time a sample": ((14, 37), {}),
    "one time a token": ((14, 3, 11), {"t_dims": 2}),
    "long rows": ((14, 4099), {}),
}


@pytest.mark.parametrize("case", list(SPLIT)[: 2 if INTERPRETED else 3])
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("noise", NOISE_MODES)
def test_a_batch_in_parts_equals_the_whole(noise, stratified, parts, case, device):
    """As a DDP run draws it: one key, each process its first_row; x_t, t and noise bit for bit."""
    shape, options = SPLIT[case]
    timesteps = fmk.LogitNormal(stratified=stratified)
    fm = fmk.FlowMatching(fmk.SchrodingerBridge(0.2), timesteps=timesteps, noise=noise)
    x1, key = torch.randn(shape, device=device), fmk.key(device)
    prediction = torch.randn(shape, device=device)
    whole = fm.sample(x1, key=key, **options)
    losses = fm.loss(prediction, whole, reduction="none")
    per_part = shape[0] // parts
    for first in range(0, shape[0], per_part):
        part = slice(first, first + per_part)
        batch = fm.sample(x1[part], key=key, first_row=first, total_rows=shape[0], **options)
        for name in ("x_t", "t", "table", "x0", "z"):
            ours, theirs = getattr(batch, name), getattr(whole, name)
            assert (ours is None) == (theirs is None) == (noise == "recompute" and name in ("x0", "z"))
            assert ours is None or ours.equal(theirs[part])
        torch.testing.assert_close(fm.loss(prediction[part], batch, reduction="none"), losses[part])


def test_stratified_times_fill_every_stratum_once(device):
    fm = fmk.FlowMatching(timesteps=fmk.Uniform(stratified=True))
    t = fm.sample(torch.zeros(97, 1, device=device)).t
    assert sorted((t * 97).long().tolist()) == list(range(97))


def test_store_and_recompute_give_the_same_numbers(device):
    """Both see the normal rounded to the data's dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results = []
        for noise in NOISE_MODES:
            torch.manual_seed(1)
            fm, batch, prediction = head(device, (16, 129), dtype, schedule=fmk.SchrodingerBridge(0.5), noise=noise)
            loss = fm.loss(prediction, batch)
            loss.backward()
            results.append((batch.x_t, batch.t, loss.detach(), prediction.grad))
        for a, b in zip(*results):
            assert a.equal(b)


def test_micro_batches_of_tokens(device):
    """Accumulated over micro-batches with a time a token, the gradients are those of the whole batch."""
    fm = fmk.FlowMatching(timesteps=fmk.LogitNormal())
    model = torch.nn.Linear(8, 8, device=device)
    x1, key = torch.randn(12, 5, 8, device=device), fmk.key(device)

    def step(rows):
        batch = fm.sample(x1[rows], key=key, first_row=rows.start, total_rows=12, t_dims=2)
        assert batch.t.shape == (rows.stop - rows.start, 5)
        return fm.loss(model(batch.x_t) * batch.t.unsqueeze(-1), batch)

    step(slice(0, 12)).backward()
    whole = model.weight.grad.clone()
    model.zero_grad()
    for first in (0, 4, 8):
        (step(slice(first, first + 4)) / 3).backward()
    torch.testing.assert_close(model.weight.grad, whole)


def test_half_precision_never_rounds_times(device):
    """bf16 data: t is float32, and no target explodes because t rounded to 1."""
    fm = fmk.FlowMatching(fmk.LinearVP(), timesteps=fmk.LogitNormal(5.0, 1.0))
    batch = fm.sample(torch.randn(4096, 1, device=device).bfloat16())
    assert batch.t.dtype == torch.float32 and batch.table.dtype == torch.float32
    assert batch.table.isfinite().all() and batch.t.max() <= fm.schedule.t_range[1]
    loss = fm.loss(torch.zeros(4096, 1, device=device).bfloat16(), batch)
    assert loss.dtype == torch.float32 and loss.isfinite()
