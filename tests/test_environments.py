"""Broken environments: each gives a message that says what to do, and none but a wrong torch keeps from importing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmkernels
from fmkernels import _info, _registration

ROOT = Path(__file__).parent.parent
PACKAGE = Path(_registration.__file__).parent
NOWHERE = "/dev/null/nowhere"  # cannot be made, not even by root
USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fmkernels
print("WARNINGS", [str(one.message) for one in caught if "fmkernels" in str(one.message)])
import torch
x = torch.ones(2, 3)
print("ANSWER", fmkernels.ops.guided_euler(x, x, 0 * x, 0.5, 2.0).tolist())
fm = fmkernels.FlowMatching()
fm.loss(torch.zeros_like(x, requires_grad=True), fm.sample(x)).backward()
from fmkernels.__main__ import main
raise SystemExit(main(["info"]))
"""
ANSWER = "ANSWER [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]"


def library():
    """The library that this process would load, or a skip."""
    path = PACKAGE / "_C.so"
    if not path.exists():
        pytest.skip("needs a compiled library to break")
    return path


def run(*command, cwd=None, **environment):
    """(exit status, all that was printed), in an environment without what the tests' own has set."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FMK_", "TRITON_", "PYTHON"))}
    own |= {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=own, cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


# --- at run time ---


def test_without_a_library_and_without_a_place_to_write(tmp_path):
    """As pip installs it with FMK_EXTENSION=0, for a user whose home cannot be written."""
    shutil.copytree(PACKAGE, tmp_path / "fmkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    before = sorted(tmp_path.rglob("*"))
    status, printed = run(
        "-c", USE, cwd="/", PYTHONPATH=tmp_path, PYTHONDONTWRITEBYTECODE=1, HOME=NOWHERE, XDG_CACHE_HOME=NOWHERE,
        TORCHINDUCTOR_CACHE_DIR=f"{NOWHERE}/inductor",
    )  # fmt: skip
    assert status == 0, printed
    assert "WARNINGS []" in printed and ANSWER in printed
    assert f"note: compiled library not built: {tmp_path}/fmkernels/_C.so is missing" in printed
    assert "pip install" in printed and "  cpp" not in printed
    assert f"note: Triton cannot write its cache {NOWHERE}/.triton/cache: set TRITON_CACHE_DIR" in printed
    assert f"note: torch.compile cannot write its cache {NOWHERE}/inductor: set TORCHINDUCTOR_CACHE_DIR" in printed
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_library_that_does_not_load_is_warned_about_once(tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(library().read_bytes()[:-4096])
    status, printed = run("-c", USE, cwd=PACKAGE.parent, FMK_LIBRARY=broken)
    assert status == 0, printed
    assert ANSWER in printed and "  cpp" not in printed, "the references answer, and info shows it"
    assert printed.count(f"compiled library {broken} does not load into torch {torch.__version__}") == 2
    (warned,) = [line for line in printed.splitlines() if line.startswith("WARNINGS")]
    assert "file too short" in warned and "pip install" in warned, "the loader's reason and the remedy"


@pytest.fixture
def problems(monkeypatch):
    monkeypatch.setattr(_registration, "problems", [])
    monkeypatch.delenv("FMK_LIBRARY", raising=False)
    monkeypatch.delenv("FMK_BACKEND", raising=False)
    return _registration.problems


def test_a_library_for_another_torch(problems, monkeypatch, tmp_path):
    broken = tmp_path / "other.so"
    broken.write_bytes(library().read_bytes().replace(b"aoti_torch_get_dtype\0", b"aoti_torch_get_dtypo\0"))
    monkeypatch.setenv("FMK_LIBRARY", str(broken))
    with pytest.warns(RuntimeWarning, match=r"does not load into torch .*undefined symbol.*pip install"):
        _registration.load_compiled()
    assert len(problems) == 1


def test_a_library_named_that_is_not_there(problems, monkeypatch):
    monkeypatch.setenv("FMK_LIBRARY", "/nowhere/_C.so")
    with pytest.warns(RuntimeWarning, match=r"/nowhere/_C.so is missing, which FMK_LIBRARY names: correct or unset it"):
        _registration.load_compiled()


def test_a_backend_asked_for_that_is_not_built(problems, monkeypatch, tmp_path):
    monkeypatch.setattr(_registration, "library_path", lambda: tmp_path / "_C.so")
    monkeypatch.setenv("FMK_BACKEND", "cpp")
    with pytest.warns(RuntimeWarning, match=r"FMK_BACKEND=cpp asks for it.*pip install"):
        _registration.load_compiled()


def test_a_library_older_than_the_package(problems, monkeypatch):
    library()
    monkeypatch.setitem(_registration.references, "runge_kutta_9", None)
    monkeypatch.setattr(_registration, "answering", lambda op, _: "reference" if op == "runge_kutta_9" else "cpp")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    _registration.load_compiled()
    (problem,) = problems
    assert "older than the package, without runge_kutta_9" in problem and "pip install" in problem


def test_a_wrong_backend(monkeypatch):
    monkeypatch.setenv("FMK_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="FMK_BACKEND: expected one of auto, reference, .*got 'cudnn'"):
        _registration.backend()


@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_triton_is_missing(asked, problems, monkeypatch):
    monkeypatch.setenv("FMK_BACKEND", asked)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    if asked == "auto":
        _registration.choose_backends()
        assert problems == ["Triton kernels not used on CUDA: triton is not installed (pip install triton)"]
    else:
        with pytest.raises(RuntimeError, match="FMK_BACKEND=triton: expected triton.*got triton not installed"):
            _registration.choose_backends()


def test_a_torch_too_old(monkeypatch):
    spec = importlib.util.spec_from_file_location("fmkernels._old", _registration.__file__)
    monkeypatch.setattr(torch, "__version__", "2.8.1+cu126")
    with pytest.raises(ImportError, match=r"needs torch 2.11 or later, found 2.8.1\+cu126: pip install --upgrade"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_caches_that_can_be_written_are_no_note(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert _info.unwritable_caches() == []


def odeint_of_torchdiffeq():
    x = torch.ones(2)
    fmkernels.odeint(lambda t, y: -y, x, torch.tensor([0.0, 1.0]), method="implicit_adams")


def plan_of_pot():
    from fmkernels.integrations.torchcfm import ExactOptimalTransportConditionalFlowMatcher

    x = torch.randn(4, 2)
    ExactOptimalTransportConditionalFlowMatcher().sample_location_and_conditional_flow(x, x)


def bar_of_tqdm():
    fmkernels.solve(lambda t, y: -y, torch.ones(2, 1), progress=True)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        ("torchdiffeq", "torchdiffeq", odeint_of_torchdiffeq),
        ("ot", "POT", plan_of_pot),
        ("tqdm", "tqdm", bar_of_tqdm),
    ],
)
def test_a_package_is_missing(module, name, call, monkeypatch):
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        call()


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_without_kernels(dtype):
    x = torch.zeros(2, 3).to(dtype)
    with pytest.raises(TypeError, match=rf"^x1: expected dtype .*float32.*, got {str(dtype).removeprefix('torch.')}"):
        fmkernels.FlowMatching().sample(x)


# --- when it is built ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    if not all((ROOT / name).exists() for name in ("setup.py", "fmkernels")):
        pytest.skip("needs the source")
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("fmkernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def fake(folder, **files):
    """Modules that come before the installed ones."""
    for name, text in files.items():
        path = folder / name.replace("__in__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def build(source, *arguments, **environment):
    return run("setup.py", "-q", *(arguments or ("build_ext", "--inplace")), cwd=source, **environment)


BUILDS = {
    "wrong CXX": ({"CXX": "/nowhere/g++"}, ["C++20 compiler, CXX=/nowhere/g++ is not found", "FMK_EXTENSION=0 pip"]),
    "no compiler": ({"PATH": "/nowhere"}, ["C++20 compiler, found none", "apt-get install g++", "FMK_EXTENSION=0 pip"]),
    "no nvcc": ({"FMK_CUDA": 1, "CUDA_HOME": "/none", "PATH": "no nvcc"}, ["found no nvcc in /none/bin", "toolkit"]),
    "FMK_CUDA": ({"FMK_CUDA": "yes"}, ["FMK_CUDA: expected auto, 0 or 1, got 'yes'"]),
    "old torch": ({"PYTHONPATH": "old torch"}, ["PyTorch 2.11 or later, found 2.8.0", "pip install --upgrade torch"]),
    "old setuptools": ({"PYTHONPATH": "old setuptools"}, ["setuptools 77 or later, found 65.5.0", "--upgrade"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILDS)
def test_what_a_build_lacks(case, source, tmp_path):
    environment, expected = BUILDS[case]
    environment = {"FMK_CUDA": 0} | environment
    compilers = [path for path in map(shutil.which, ("g++", "clang++", "c++")) if path]
    if environment.get("PATH") == "no nvcc":
        if not compilers:
            pytest.skip("needs a C++ compiler")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / Path(compilers[0]).name).symlink_to(compilers[0])
        environment["PATH"] = tmp_path / "bin"
    if case == "old torch":
        fake(
            tmp_path,
            **{"torch__in____init__.py": "", "torch-2.8.0.dist-info__in__METADATA": "Name: torch\nVersion: 2.8.0\n"},
        )
        environment["PYTHONPATH"] = tmp_path
    if case == "old setuptools":
        text = "__version__ = '65.5.0'\nExtension = setup = None\n"
        more = {
            "setuptools__in__command__in____init__.py": "",
            "setuptools__in__command__in__build_ext.py": "build_ext = 0",
        }
        fake(tmp_path, **{"setuptools__in____init__.py": text}, **more)
        environment["PYTHONPATH"] = tmp_path
    status, printed = build(source, **environment)
    assert status == 1 and "Traceback" not in printed, printed
    assert all(text in printed for text in expected), printed


def test_a_build_folder_that_cannot_be_written(source):
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    (source / "build").touch()
    try:
        status, printed = build(source, FMK_CUDA=0)
    finally:
        (source / "build").unlink()
    assert status == 1 and "Traceback" not in printed, printed
    assert f"building needs to write {source}/build/release/_C" in printed and "Copy the source" in printed
