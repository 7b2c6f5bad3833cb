"""Fixtures of every test: the devices at hand, poisoned memory, fixed seeds."""

import os

os.environ.setdefault("FMK_POISON", "1")  # fresh memory of the compiled kernels is NaN; read at the first allocation

import pytest
import torch
from contract_op import DEVICES, INTERPRETED

MARKERS = (
    "large: more than 2³¹ elements; skipped where memory is short",
    "compiles: needs torch.compile, which does not apply to interpreted Triton kernels",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config, items):
    if INTERPRETED:
        skip = pytest.mark.skip(reason="torch.compile does not trace the Triton interpreter")
        for item in items:
            if item.get_closest_marker("compiles"):
                item.add_marker(skip)


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """Fresh memory of torch is NaN: an element that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
