"""Contract, gradients and traps again in a process each: on the references alone, and on interpreted Triton."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("tests/test_contract.py", "tests/test_gradients.py", "tests/test_traps.py")
BACKENDS = {
    "reference": {"FMK_BACKEND": "reference"},
    # The variable must be set before triton is imported.
    "triton": {"FMK_BACKEND": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
}


@pytest.mark.slow
@pytest.mark.skipif("FMK_BACKEND" in os.environ, reason="this process has a backend of its own already")
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend):
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | BACKENDS[backend], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
