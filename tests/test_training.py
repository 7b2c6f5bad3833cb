"""Training set-ups on a small U-Net and a small transformer: the steps of a plain PyTorch head on the same noise.

Mixed precision, loss scaling, accumulation, clipping, averaged weights, activation checkpointing, functional calls,
memory formats, optimizers, and whole steps under torch.compile.
"""

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fmkernels as fmk

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # as for a script that is run by its path
from networks import Attention, ResidualBlock, Transformer, TransformerBlock, UNet, UNetSize

SHAPE = (6, 3, 8, 8)
NETWORKS = {
    "unet": lambda: UNet(SHAPE[1:], UNetSize(8, (1, 2), 1, (), 8)),
    "transformer": lambda: Transformer(SHAPE[1:], width=32, depth=2),
}
SHALLOW = {  # for what compiles
    "unet": lambda: UNet(SHAPE[1:], UNetSize(8, (1,), 1, (), 8)),
    "transformer": lambda: Transformer(SHAPE[1:], width=32, depth=1),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network_of(name, device, networks=NETWORKS):
    """With no weight left at zero, so that every gradient is there from the first step."""
    network = networks[name]()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network.to(device)


def fused(model, x1, key, first=0, total=None):
    """The mean loss of the library's head."""
    batch = HEAD.sample(x1, key=key, first_row=first, total_rows=total)
    return HEAD.loss(model(batch.x_t, batch.t), batch)


def plain(model, x1, key, first=0, total=None):
    """The same in plain PyTorch, from the same t and noise."""
    t = HEAD.sample(x1[:, :1, 0, 0].float(), key=key, first_row=first, total_rows=total).t
    x0 = fmk.ops.noise(key, len(x1), x1[0].numel(), first_row=first, dtype=x1.dtype).view(x1.shape)
    s = t.view(-1, 1, 1, 1)
    x_t = ((1 - s) * x0 + s * x1).to(x1.dtype)
    prediction = model(x_t, t)
    return nn.functional.mse_loss(prediction.float(), (x1 - x0).float())


HEAD = fmk.FlowMatching(timesteps=fmk.LogitNormal(stratified=True))


def batches(device, count=STEPS):
    return [(torch.randn(SHAPE, device=device), fmk.key(device)) for _ in range(count)]


def train(head, model, data, amp=None, optimizer=torch.optim.AdamW, scale=None, **options):
    """Losses, norms and averaged weights of steps with clipping, a moving average and, with ``scale``, a scaler."""
    device = data[0][0].device.type
    optimizer = optimizer(model.parameters(), lr=1e-2, **options)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scaler = torch.amp.GradScaler(device, enabled=scale is not None, init_scale=scale or 1.0)
    seen = []
    for x1, key in data:
        optimizer.zero_grad()
        with torch.autocast(device, amp, enabled=amp is not None):
            loss = head(model, x1, key)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        seen += [loss.detach(), norm]
        assert norm > 0.5, "nothing was clipped"
    return torch.stack(seen), [p.detach() for p in average.parameters()], scaler.get_scale()


ADAM = {"eps": 1e-3}  # with 1e-8 Adam turns the rounding of a gradient that is 0 into a step of any size
SETUPS = {
    "fp32, foreach": ({"optimizer": torch.optim.AdamW, "foreach": True, **ADAM}, 2e-5),
    "fp32, fused": ({"optimizer": torch.optim.AdamW, "fused": True, **ADAM}, 2e-5),
    "fp32, momentum": ({"optimizer": torch.optim.SGD, "momentum": 0.9, "foreach": False}, 2e-5),
    "bf16": ({"amp": torch.bfloat16, **ADAM}, 2e-2),
    "fp16, scaled": ({"amp": torch.float16, "scale": 1024.0, **ADAM}, 5e-3),
}


@pytest.mark.parametrize("setup", SETUPS)
@each_network
def test_steps_are_those_of_the_plain_head(name, setup, device):
    options, bound = SETUPS[setup]
    data = batches(device)
    model = network_of(name, device)
    ours, theirs = (train(head, copy.deepcopy(model), data, **options) for head in (fused, plain))
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=bound, atol=0)
    averages = ours[1], theirs[1], model.parameters()
    mine, their, start = (torch.cat([p.detach().flatten() for p in values]) for values in averages)
    moved = (their - start).norm()
    assert moved > 1e-3 and (mine - their).norm() <= 5 * bound * moved
    assert ours[2] == theirs[2] == (options.get("scale") or 1.0), "a step was skipped"


@each_network
def test_an_overflow_is_skipped_and_the_next_step_is_not(name, device):
    """Scaled far too much in fp16, the head's gradient is infinite, the weights stay, and the scale halves."""
    model, (x1, key) = network_of(name, device), batches(device, 1)[0]
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**30)
    taken = []
    for _ in range(24):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = fused(model, x1, key)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        taken.append(scaler.get_scale() == before)
        if taken[-1]:
            break
        assert all(p.equal(w) for p, w in zip(model.parameters(), weights)) and loss.isfinite()
    assert len(taken) > 1 and taken[-1], "the scale came down"
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not p.equal(w) for p, w in zip(model.parameters(), weights))


def gradients_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@each_network
def test_accumulated_parts_are_the_batch(name, device):
    """Parts of 1, 3 and 2 rows, each mean weighted by its rows, with times stratified over the whole."""
    model, (x1, key) = network_of(name, device), batches(device, 1)[0]
    whole = gradients_of(fused(model, x1, key), model)
    loss = 0
    for first, last in ((0, 1), (1, 4), (4, 6)):
        part = fused(model, x1[first:last], key, first, 6) * ((last - first) / 6)
        part.backward()
        loss += part.detach()
    torch.testing.assert_close(loss, plain(model, x1, key).detach())
    for parameter, gradient in zip(model.parameters(), whole):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@each_network
def test_checkpointed_blocks_have_equal_gradients(name, reentrant, device):
    """Every block is computed again in the backward, after the head's; a key drawn before stays drawn once."""
    model, (x1, key) = network_of(name, device), batches(device, 1)[0]
    expected = gradients_of(fused(model, x1, key), model)
    calls = []

    def counted(forward, *inputs):
        calls.append(forward)
        return forward(*inputs)

    for module in model.modules():
        if isinstance(module, (ResidualBlock, Attention, TransformerBlock)):
            forward = functools.partial(counted, module.forward)
            module.forward = functools.partial(checkpoint, forward, use_reentrant=reentrant)
    loss = fused(model, x1, key)
    blocks = len(calls)
    loss.backward()
    assert len(calls) == 2 * blocks > 2
    # The reentrant form adds the gradients of what blocks share, the features of t, in another order.
    bound = {"rtol": 1e-4, "atol": 1e-6} if reentrant else {"rtol": 0, "atol": 0}
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, **bound)


@each_network
def test_channels_last(name, device):
    """Data and network in channels_last: the numbers of contiguous ones, whatever layout the prediction has."""
    model, (x1, key) = network_of(name, device), batches(device, 1)[0]
    expected = fused(model, x1, key)
    gradients = gradients_of(expected, model)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    layouts = []

    def seen(x, t):
        prediction = last(x.contiguous(memory_format=torch.channels_last), t)
        layouts.append(prediction.is_contiguous())
        return prediction

    for data in (x1, x1.contiguous(memory_format=torch.channels_last)):
        loss = fused(seen, data, key)
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(gradients_of(loss, last), gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert layouts == [name == "transformer"] * 2


@each_network
def test_functional_calls(name, device):
    """torch.func.grad of a stateless call through the head, as for meta-learning and ensembles."""
    model, (x1, key) = network_of(name, device), batches(device, 1)[0]
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss_of(weights):
        return fused(lambda x, t: torch.func.functional_call(model, weights, (x, t)), x1, key)

    expected = fused(model, x1, key)
    gradients, loss = torch.func.grad_and_value(loss_of)(weights)
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(gradients.values(), gradients_of(expected, model)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def compiled_and_eager(model, device, backend, amp=None, moving=False):
    """Losses and weights after steps whose loss is one graph; a recompile for a new key or offset would raise."""
    results = []
    for compiling in (True, False):
        network = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2, **ADAM)

        def loss_of(x1, key, first, network=network):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                return fused(network, x1, key, first, 100)

        step = torch.compile(loss_of, fullgraph=True, backend=backend) if compiling else loss_of
        torch.manual_seed(1)
        losses = []
        for number, (x1, key) in enumerate(batches(device, STEPS + 1)):
            # A first offset is taken for a constant, a second for a symbol, and then nothing compiles again.
            allowed = number <= moving
            with torch._dynamo.config.patch(error_on_recompile=not allowed):
                loss = step(x1, key, 6 * number if moving else 12)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append((torch.stack(losses), *(p.detach() for p in network.parameters())))
    return zip(*results)


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", SHALLOW)
def test_compiled_steps_are_the_eager_ones(name, device):
    """The U-Net with keys that change, the transformer under autocast with offsets that change too."""
    torch._dynamo.reset()
    extra = (torch.bfloat16, True) if name == "transformer" else ()
    bound = {"rtol": 0.02, "atol": 0.01} if extra else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in compiled_and_eager(network_of(name, device, SHALLOW), device, "aot_eager", *extra):
        torch.testing.assert_close(ours, theirs, **bound)


@pytest.mark.compiles
@pytest.mark.slow
def test_inductor_steps_are_the_eager_ones(device):
    torch._dynamo.reset()
    model = network_of("transformer", device, SHALLOW)
    for ours, theirs in compiled_and_eager(model, device, "inductor"):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.slow
def test_a_step_with_its_backward_and_optimizer_in_one_compiled_function(device):
    """Dynamo leaves the backward to autograd and takes up again behind it."""
    torch._dynamo.reset()
    results = []
    for compiling in (True, False):
        torch.manual_seed(0)
        model = network_of("transformer", device, SHALLOW)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)

        def step(x1, key, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = fused(model, x1, key)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            return loss.detach()

        taken = torch.compile(step, backend="aot_eager") if compiling else step
        losses = [taken(x1, key) for x1, key in batches(device)]
        results.append((torch.stack(losses), *(p.detach() for p in model.parameters())))
    for compiled, eager in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
