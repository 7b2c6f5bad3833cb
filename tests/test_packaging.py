"""What is published: source distribution and wheel, their contents and metadata, and the types of the public names."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
import typed_user

import fmkernels

ROOT = Path(__file__).parent.parent
PUBLIC = ["", ".ops", ".layers", ".solvers", ".schedules", ".timesteps", ".objectives", ".distributions", ".likelihood"]
PUBLIC += [f".integrations.{name}" for name in ("torchdiffeq", "torchcfm", "flow_matching", "diffusers")]


def run(*command, cwd=None, **environment):
    own = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=own, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The checkout without what git ignores, but for the objects that are compiled already."""
    if not all((ROOT / name).exists() for name in ("setup.py", "fmkernels")):
        pytest.skip("needs the source")
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("source") / "fmkernels"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("fmkernels", "csrc", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    return folder


def build(source, kind, **environment):
    run("-m", "build", "--no-isolation", "--skip-dependency-check", f"--{kind}", cwd=source, **environment)
    (made,) = (source / "dist").iterdir()
    shutil.move(made, source.parent / made.name)
    return source.parent / made.name


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        return names, Parser().parsestr(archive.read(metadata).decode())


def test_wheel_without_extension_is_pure(source):
    """From the source distribution, which has all that a checkout has."""
    sdist = build(source, "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(source.parent / "unpacked", filter="data")
    for folder in ("csrc", "fmkernels", "tests", "benchmarks", "examples"):
        there = {str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()}
        assert there <= names, there - names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "requirements.txt", "requirements-peers.txt"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)
    (unpacked,) = (source.parent / "unpacked").iterdir()
    wheel = build(unpacked, "wheel", FMK_EXTENSION=0)
    assert wheel.name == f"fmkernels-{fmkernels.__version__}-py3-none-any.whl"
    names, metadata = contents(wheel)
    assert "fmkernels/py.typed" in names and not any(name.endswith(".so") for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)
    modules = {str(path.relative_to(source)) for path in (source / "fmkernels").rglob("*.py")}
    assert modules <= set(names)
    assert metadata["License-Expression"] == "BSD-3-Clause" and metadata["Requires-Python"] == ">=3.10"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {"torch>=2.11", "numpy"} <= set(metadata.get_all("Requires-Dist"))
    assert {"ot", "peers", "test", "triton"} <= set(metadata.get_all("Provides-Extra"))


def test_wheel_serves_every_python_and_works_outside_of_the_checkout(source):
    objects = ROOT / "build/release/_C"
    library = ROOT / "fmkernels/_C.so"
    if not objects.exists() or not library.exists():
        pytest.skip("the library was not built in this folder")
    if any(path.stat().st_mtime > library.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*")):
        pytest.skip("the library is older than its sources: build it first, or all of it would be compiled here")
    shutil.copytree(objects, source / "build/release/_C")
    built_for_cuda = (objects / "csrc/cuda").exists()
    wheel = build(source, "wheel", FMK_CUDA=int(built_for_cuda), FMK_EXTENSION=1)
    assert wheel.name.startswith(f"fmkernels-{fmkernels.__version__}-py3-none-linux_")
    names, _ = contents(wheel)
    assert [name for name in names if name.endswith(".so")] == ["fmkernels/_C.so"]
    site = source.parent / "site"
    with zipfile.ZipFile(wheel) as archive:  # all that installing it does
        archive.extractall(site)
    printed = run("-m", "fmkernels", "info", cwd="/", PYTHONPATH=site, FMK_LIBRARY="", FMK_BACKEND="auto")
    assert f"{site}/fmkernels/_C.so" in printed and "note: compiled" not in printed
    assert any(line.split()[:2] == ["noise", "cpp"] for line in printed.splitlines())


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_annotated_whole(module):
    module = importlib.import_module(f"fmkernels{module}")
    lacking = []
    for name in module.__all__:
        value = getattr(module, name)
        functions = {name: value} if inspect.isfunction(value) else {}
        if inspect.isclass(value) and value.__module__.startswith("fmkernels"):
            members = {key: member for key, member in vars(value).items() if key == "__init__" or key[0] != "_"}
            members = {key: getattr(member, "__func__", member) for key, member in members.items()}
            functions = {f"{name}.{key}": member for key, member in members.items() if inspect.isfunction(member)}
        for key, function in functions.items():
            if function.__module__ is None or not function.__module__.startswith("fmkernels"):
                continue  # written by dataclass or NamedTuple
            signature = inspect.signature(function)
            bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
            bare = bare[1:] if bare[:1] in (["self"], ["cls"]) else bare
            if bare or (signature.return_annotation is signature.empty and not key.endswith("__init__")):
                lacking.append(f"{key}({', '.join(bare)})")
    assert not lacking


def test_a_typed_users_code_runs():
    model = lambda x, t: 0 * x  # noqa: E731
    fm, x1 = fmkernels.FlowMatching(), torch.randn(4, 3)
    assert typed_user.train(model, x1).shape == ()
    assert typed_user.sample(fm, model, x1).shape == typed_user.ops(fmkernels.key()).shape == (4, 3)
    assert typed_user.score(fm, model, x1).shape == (4,)
    assert typed_user.exact(x1)[1].shape == (4, 2)
    fmkernels.FlowMatching(typed_user.Power()).sample(x1)


def test_version_is_one():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{fmkernels.__version__}"\n' in text
