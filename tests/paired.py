"""flow_matching's classes and ours under the same names, and how what they return is compared."""

import pytest
import torch

from fmkernels.integrations import flow_matching as ours

their_path = pytest.importorskip("flow_matching.path")
their_scheduler = pytest.importorskip("flow_matching.path.scheduler")
their_solver = pytest.importorskip("flow_matching.solver")
their_utils = pytest.importorskip("flow_matching.utils")

NAMES = {
    name: getattr(module, name)
    for module in (their_path, their_scheduler, their_solver, their_utils)
    for name in ours.__all__
    if hasattr(module, name)
}

SCHEDULERS = [
    ("CondOTScheduler", ()),
    ("PolynomialConvexScheduler", (3,)),
    ("PolynomialConvexScheduler", (1.5,)),
    ("VPScheduler", ()),
    ("VPScheduler", (0.2, 9.0)),
    ("LinearVPScheduler", ()),
    ("CosineScheduler", ()),
]
scheduled = pytest.mark.parametrize(("name", "arguments"), SCHEDULERS, ids=[f"{n}{a}" for n, a in SCHEDULERS])


def pair_of_classes(name):
    return NAMES[name], getattr(ours, name)


def pair(name, *arguments):
    """(the original's object, ours)."""
    return NAMES[name](*arguments), getattr(ours, name)(*arguments)


def same(a, b, *, strides=True):
    """Equal in every bit and all that a tensor shows."""
    assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
    assert a.requires_grad == b.requires_grad
    assert not strides or a.stride() == b.stride() or a.numel() == 0
    assert torch.equal(a.detach().nan_to_num(7.5), b.detach().nan_to_num(7.5))


def fails_alike(call, theirs, mine):
    """Both raise; returns ours, which is of the type of theirs."""
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(expected.type) as got:
        call(mine)
    return got.value
