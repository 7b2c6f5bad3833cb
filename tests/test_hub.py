"""The layout for the Hugging Face hub: build.toml, layers, benchmark, and a local build that `kernels` loads."""

import base64
import hashlib
import inspect
import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

import fmkernels
from fmkernels import _registration, layers, ops

ROOT = Path(__file__).parent.parent
NAME = "_fmkernels_cpu_0123abc"  # as kernel-builder names a build
if not (ROOT / "build.toml").exists():
    pytest.skip("the layout for the hub is part of the checkout alone", allow_module_level=True)
kernels = pytest.importorskip("kernels")
tomllib = pytest.importorskip("tomllib")


def listed():
    return tomllib.loads((ROOT / "build.toml").read_text())


def test_build_toml_is_valid_and_lists_every_source():
    from kernels._rust import Build

    Build.open(ROOT)  # raises for what kernel-builder would refuse
    build = listed()
    for part in (build["torch"], *build["kernel"].values()):
        assert all((ROOT / file).is_file() for file in part["src"])
        assert len(part["src"]) == len(set(part["src"]))
    there = {folder: {str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).iterdir()} for folder in
             ("cpu", "cuda", "math")}  # fmt: skip
    bridge = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/torch").glob("*.h")}
    cpu = there["cpu"] | there["math"] | bridge
    assert set(build["kernel"]["fmkernels_cpu"]["src"]) == cpu
    assert set(build["kernel"]["fmkernels_cuda"]["src"]) == cpu | there["cuda"]
    assert "csrc/torch/build_info.cpp" in build["torch"]["src"]
    assert (ROOT / "torch-ext/fmkernels").resolve() == ROOT / "fmkernels", "the Python part is the package itself"


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_are_pure(name):
    """What `kernels` asks of a layer, and arguments that the op has, under the same names."""
    layer = getattr(layers, name)
    assert issubclass(layer, torch.nn.Module) and layer.__init__ is torch.nn.Module.__init__
    own = {member for member in vars(layer) if not member.startswith("__")}
    assert own == {"forward", "has_backward", "can_torch_compile"}
    op = {"MarginalMoments": "marginal_field"}.get(name)
    op = op or "".join("_" + c.lower() if c.isupper() else c for c in name)[1:]
    accepted = inspect.signature(getattr(ops, op)).parameters
    given = list(inspect.signature(layer.forward).parameters.values())[1:]
    assert all(p.name in accepted and p.default == accepted[p.name].default for p in given)


def test_layers_answer_differentiate_and_compile():
    x, c, u = torch.randn(3, 4, 5, requires_grad=True)
    guided = layers.GuidedEuler()
    torch.testing.assert_close(guided(x, c, u, 0.1, 2.0), ops.guided_euler(x, c, u, 0.1, 2.0))
    gradient = torch.autograd.grad(guided(x, c, u, 0.1, 2.0).sum(), c)[0]
    torch.testing.assert_close(gradient, torch.full_like(c, 0.2))
    key = torch.tensor([7])
    assert torch.equal(layers.Noise()(key, 3, 5), ops.noise(key, 3, 5))
    assert torch.equal(layers.Probe()(key, 3, 5, "normal", 2), ops.probe(key, 3, 5, distribution="normal", probes=2))
    values = torch.randn(2, 3, 5)
    assert torch.equal(layers.ProbeDot()(key, values), ops.probe_dot(key, values))
    x1 = torch.randn(3, 5)
    path = layers.SamplePath()(x1, key=key)
    assert torch.equal(path.x_t, ops.sample_path(x1, key=key).x_t)
    prediction = torch.randn(3, 5, requires_grad=True)
    loss = layers.MatchingLoss()(prediction, x1, path.table, key=key)
    assert torch.equal(loss, ops.matching_loss(prediction, x1, path.table, key=key))
    coefficients = torch.rand(3, 4)
    for ours, again in zip(
        layers.ConditionalFlow()(x1, x1 + 1, values[0], coefficients),
        ops.conditional_flow(x1, x1 + 1, values[0], coefficients),
    ):
        assert torch.equal(ours, again)
    at = torch.full((3,), 0.5, dtype=torch.float64)
    moments = layers.MarginalMoments()(x1, at, at, x1)
    assert torch.equal(moments.mean, ops.marginal_field(x1, at, at, x1).mean)
    backend = "eager"  # what is asked is whether the layers are traced whole
    compiled = torch.compile(guided, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, c, u, 0.1, 2.0), guided(x, c, u, 0.1, 2.0))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """What kernel-builder makes of the checkout, with the smallest of the C++ files in its library."""
    repository = tmp_path_factory.mktemp("hub") / "fmkernels"
    variant = repository / "build" / "torch-stable-abi211-cpu-x86_64-linux"
    shutil.copytree(ROOT / "torch-ext/fmkernels", variant, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if compiler is None or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("needs a C++ compiler on x86-64 Linux")
    home = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{home}/include",
        "-Icsrc",
    ]
    flags += [f"-DTORCH_EXTENSION_NAME={NAME}", "-o", str(variant / f"{NAME}.abi3.so"), "csrc/torch/build_info.cpp"]
    subprocess.run([compiler, *flags, f"-L{home}/lib", "-Wl,--no-as-needed", "-ltorch"], cwd=ROOT, check=True)
    (variant / "_ops.py").write_text(
        "from pathlib import Path\n\nimport torch\n\n"
        f"torch.ops.load_library(str(Path(__file__).parent / '{NAME}.abi3.so'))\nops = torch.ops.{NAME}\n\n\n"
        f"def add_op_namespace_prefix(name):\n    return f'{NAME}::{{name}}'\n"
    )
    digests = {
        str(path.relative_to(variant)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in variant.rglob("*") if path.is_file()
    }  # fmt: skip
    general = listed()["general"]
    metadata = {"id": NAME, "backend": {"type": "cpu"}, "digest": {"algorithm": "sha256", "files": digests}}
    metadata |= {name: general[name] for name in ("name", "version", "license")}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"python-depends": []}))
    return repository


@pytest.fixture(scope="module")
def kernel(repository):
    return kernels.get_local_kernel(repository)


def test_a_local_build_has_a_namespace_of_its_own(kernel):
    assert kernel is not fmkernels and kernel._registration.NAMESPACE == NAME
    assert kernel._registration.build_facts() == {}, "the C++ files register in it"
    assert getattr(torch.ops, NAME).noise.default is not torch.ops.fmkernels.noise.default
    assert kernel._registration.references.keys() == _registration.references.keys()
    key = torch.tensor([3])
    torch.testing.assert_close(kernel.ops.noise(key, 4, 6), ops.noise(key, 4, 6))
    x1 = torch.randn(4, 6)
    fm = kernel.FlowMatching()
    assert fm.loss(torch.zeros_like(x1, requires_grad=True), fm.sample(x1)).requires_grad


def test_kernelize_puts_a_layer_of_it_into_a_module(repository, kernel):
    @kernels.use_kernel_forward_from_hub("GuidedEuler")
    class GuidedEuler(torch.nn.Module):
        def forward(self, x, conditional, unconditional, h, scale, rescale=0.0):
            raise AssertionError("the original was called")

    mapping = {"GuidedEuler": {"cpu": kernels.LocalLayerRepository(repository, layer_name="GuidedEuler")}}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        module = kernels.kernelize(GuidedEuler(), mode=mode, device="cpu", use_fallback=False)
    x, c, u = torch.randn(3, 2, 5)
    torch.testing.assert_close(module(x, c, u, 0.1, 2.0), ops.guided_euler(x, c, u, 0.1, 2.0))


def test_benchmark_runs(kernel):
    from kernels.benchmark import Benchmark

    from benchmarks import benchmark_fmkernels as script

    found = [case for case in vars(script).values() if inspect.isclass(case) and issubclass(case, Benchmark)]
    found.remove(Benchmark)
    for case in found:
        bench = case()
        bench.kernel, bench.device = kernel, "cpu"
        bench.setup()
        for name in [name for name in dir(bench) if name.startswith("benchmark_")]:
            getattr(bench, name)()
            torch.testing.assert_close(bench.out, getattr(bench, name.replace("benchmark_", "verify_"))())
    assert len(found) == 2
