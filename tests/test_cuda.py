"""CUDA C++ kernels: what nvcc made of them, their values on a GPU, and without one on the host.

Compiled as C++, the kernels run with the threads of a block as fibers (csrc/cuda/emulation.h), under the same contract,
and with undefined behaviour, such as a vector access that is not aligned, ending the process.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_contract import OPS, assert_equal_bits, check_values, few_of

from fmkernels import _registration
from fmkernels.triton_kernels import KERNELS, WITHOUT_CUDA

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
LOGS = ROOT / "build" / "release" / "_C" / "csrc" / "cuda"  # what ptxas said, kept by setup.py
SOURCES = sorted(path.stem for path in CUDA.glob("*.cu"))
NVCC = _registration.build_facts().get("nvcc")
built_by_nvcc = pytest.mark.skipif(not NVCC, reason="the library was built without nvcc")
alone = pytest.mark.skipif("FMK_LIBRARY" in os.environ, reason="this process has a library of its own already")

SHAPES = {  # (shape, row dimensions) that take every way through the launch geometry
    "vectors_in_segments": ((2, 16_384), 1),
    "elements_in_segments": ((3, 40_001), 1),
    "rows_in_blocks": ((601, 8), 1),
    "one_row_with_a_tail": ((4_099,), 0),
}


def contract(*tests, **environment):
    """The contract, and the values below, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    command += ["tests/test_contract.py", f"tests/{Path(__file__).name}::test_values_of_every_launch_geometry"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_values_of_every_launch_geometry(op, shape, device):
    for labels in few_of(op, 4):
        levels = op.levels(labels, shape=SHAPES[shape])
        if op.valid(levels):
            arguments = op.make(levels, device)
            outputs = op.run(arguments)
            check_values(op, arguments, outputs)
            assert_equal_bits(op.run(arguments), outputs)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library of the CUDA kernels compiled as C++, which answers on the CPU."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("no C++ compiler")
    folder, torch_folder = tmp_path_factory.mktemp("emulated"), Path(torch.__file__).parent
    options = "-O1 -g0 -std=c++20 -fPIC -fvisibility=hidden -Wall -Werror -Wno-unknown-pragmas -Wno-narrowing".split()
    options += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    options += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT}/csrc", f"-I{torch_folder}/include"]
    for name in SOURCES:
        subprocess.run(
            [compiler, *options, "-x", "c++", "-c", CUDA / f"{name}.cu", "-o", folder / f"{name}.o"], check=True
        )
    objects, library = [folder / f"{name}.o" for name in SOURCES], folder / "_C.so"
    link = ["-shared", *objects, f"-L{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch", "-o", library]
    subprocess.run([compiler, *link], check=True)
    return library


@alone
@pytest.mark.slow
def test_contract_on_the_host(emulated):
    names = "test_values or test_layouts or test_a_row_alone"
    contract("-k", names, FMK_LIBRARY=str(emulated), FMK_BACKEND="cpp", CUDA_VISIBLE_DEVICES="")


@alone
@pytest.mark.gpu
@pytest.mark.slow
@built_by_nvcc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_contract_on_a_gpu():
    contract("-k", "[cuda", FMK_BACKEND="cuda")  # Triton answers by default


@built_by_nvcc
def test_the_library_loads_with_a_cuda_kernel_for_every_op():
    assert not any("does not load" in problem for problem in _registration.problems)
    for name, (source, _) in KERNELS.items():
        if source not in SOURCES:  # Triton alone serves it on a GPU
            assert name in WITHOUT_CUDA
            continue
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fmkernels::{name}", "CUDA"), name


def entries(name):
    """Kernel -> (bytes of stack, spill stores, spill loads, registers), each for every architecture that nvcc built."""
    log = (LOGS / f"{name}.cu.o.log").read_text()
    found = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        kernel = re.match(r"'(\w+)'", part).group(1)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        found.append((kernel, *map(int, frame.groups()), int(registers.group(1))))
    return found


@built_by_nvcc
@pytest.mark.parametrize("name", SOURCES)
def test_no_kernel_spills_or_has_a_stack(name):
    if not LOGS.exists():
        pytest.skip("the library was not built in this folder")
    kernels = entries(name)
    assert kernels
    for kernel, stack, stores, loads, registers in kernels:
        assert stack == stores == loads == 0, kernel
        assert 0 < registers <= 128, kernel


def accesses(path):
    """Kernel -> count of its memory instructions, from the machine code in an object file."""
    spec = importlib.util.find_spec("triton")  # which brings the disassembler, where the toolkit does not
    beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec else ROOT
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside)
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"Function : ", text)[1:]:
        found[part.split(None, 1)[0]] = Counter(re.findall(r"\b((?:LD|ST)[GL]?)\.?(?:E\.)?(128)?", part))
    return found


@built_by_nvcc
@pytest.mark.parametrize("name", SOURCES)
def test_loads_and_stores_are_16_bytes_wide(name):
    path = LOGS / f"{name}.cu.o"
    if not path.exists():
        pytest.skip("the library was not built in this folder")
    kernels = accesses(path)
    assert kernels
    for kernel, found in kernels.items():
        assert not any(op in ("LDL", "STL") for op, _ in found), f"{kernel} uses local memory"
        if "total_kernel" not in kernel:  # which reads a few sums
            assert found["STG", "128"] > 0, kernel
            assert "noise" in kernel or found["LDG", "128"] > 0, kernel
