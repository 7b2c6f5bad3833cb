"""Triton kernels without a GPU: run under the interpreter, and compiled ahead of time for three GPU generations.

``pytest -s tests/test_triton.py`` prints registers and instructions of every kernel compiled.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fmkernels as fmk
from fmkernels.objectives import REDUCTIONS, Objective
from fmkernels.ops.sample_path import STORE_X0, PathArguments

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS, COLUMNS = 128, 12288
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"f32": F32, "bf16": BF16}
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
THREAD_BYTES = 16  # the widest access of a thread


def run(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
def test_interpreter():
    """Every kernel against its reference, in a process of its own: see triton_interpreter.py."""
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_interpreter.py")
    result = run(*options, FMK_BACKEND="triton", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_importing_the_package_does_not_import_triton():
    program = (
        "import sys, fmkernels; assert 'triton' not in sys.modules\n"
        "from fmkernels import _registration; print(_registration.answering('noise', 'cpu'))\n"
        "import torch; fmkernels.ops.noise(torch.tensor([1]), 2, 3); assert 'triton' in sys.modules"
    )
    result = run("-W", "error::UserWarning", "-c", program, FMK_BACKEND="triton", TRITON_INTERPRET="1")
    assert (result.returncode, result.stdout) == (0, "triton\n"), result.stderr


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch can run Triton kernels on a GPU")
def test_triton_without_a_gpu_or_the_interpreter_is_an_error():
    result = run("-c", "import fmkernels", FMK_BACKEND="triton", TRITON_INTERPRET="0")
    assert result.returncode == 1
    assert "RuntimeError: FMK_BACKEND=triton: expected triton, and a CUDA build of torch" in result.stderr


# ---- ahead-of-time compilation ------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel as an op launches it: on tensors of the meta device, so at its real block size but without memory."""

    kernel: Any
    arguments: tuple
    constants: dict

    @property
    def elements(self) -> int:
        """Elements of a thread in one tile."""
        tile = 4 * self.constants["BLOCK_ROWS"] * self.constants["BLOCK_GROUPS"]
        return tile // (32 * self.constants["num_warps"])

    def compile(self, arch: int):
        """The kernel compiled as the JIT would: alignment, arguments equal to 1, and None are known."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        positional = iter(self.arguments)
        for index, parameter in enumerate(self.kernel.params):
            value = self.constants[parameter.name] if parameter.is_constexpr else next(positional)
            kind = "constexpr"
            if isinstance(value, torch.Tensor) and not parameter.is_constexpr:
                kind = "*" + TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, tuple) and not parameter.is_constexpr:
                kind = tuple("*" + TYPES[each.dtype] for each in value)
                attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(len(value))}
            elif parameter.annotation_type:
                kind = parameter.annotation_type
            elif not parameter.is_constexpr and value is not None and value != 1:
                kind = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        fusion = self.constants.get("fp_fusion", True)
        options = {"num_warps": self.constants["num_warps"], "enable_fp_fusion": fusion}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def empty(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


KEY = empty(1, dtype=torch.int64)


def noise(dtype):
    from fmkernels.triton_kernels.noise import noise

    noise(KEY, ROWS, COLUMNS, 0, 0, 0, 0, dtype)


def path(dtype, store=0, schedule=None, timesteps=None, x0=False):
    from fmkernels.triton_kernels.sample_path import sample_path

    path = PathArguments.of(Objective(schedule or fmk.CondOT()), timesteps or fmk.Uniform())
    strata = ROWS if timesteps is not None and timesteps.stratified else 0
    data = empty(ROWS, COLUMNS, dtype=dtype)
    sample_path(data, data if x0 else None, None, None, KEY, 0, strata, 1, *path, store)


def loss(dtype, x0=False, mask=None, prediction=None):
    from fmkernels.triton_kernels.matching_loss import matching_loss_forward

    data = empty(ROWS, COLUMNS, dtype=dtype)
    mask = None if mask is None else empty(*mask, dtype=torch.bool)
    matching_loss_forward(
        empty(ROWS, COLUMNS, dtype=prediction or dtype), data, data if x0 else None, None, empty(ROWS, 6), None, mask,
        KEY, 0, 3, 0, 1.0, REDUCTIONS["mean"], True,
    )  # fmt: skip


def scale(dtype):
    from fmkernels.triton_kernels.matching_loss import scale_gradient_

    scale_gradient_(empty(ROWS, COLUMNS, dtype=dtype), empty(), empty(0), 1.0)


def guided(dtype, velocity=None, rescale=0.0, per_row=False):
    from fmkernels.triton_kernels.guided_euler import guided_euler

    velocity = empty(ROWS, COLUMNS, dtype=velocity or dtype)
    coefficient = empty(ROWS) if per_row else None
    guided_euler(empty(ROWS, COLUMNS, dtype=dtype), velocity, velocity, coefficient, coefficient, -0.1, 7.5, rescale)


def flow(dtype, form="linear", rows=ROWS, columns=COLUMNS):
    from fmkernels.triton_kernels.conditional_flow import FORMS, conditional_flow

    x = empty(rows, columns, dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else F32
    noise = None if form == "affine" else x
    conditional_flow(x, x, noise, empty(rows, 4, dtype=compute), FORMS[form])


def probe(dtype, distribution=0, rows=ROWS, columns=COLUMNS):
    from fmkernels.triton_kernels.probe import probe

    probe(KEY, rows, columns, distribution, 4, 0, 0, dtype)


def probe_dot(dtype, distribution=0, rows=ROWS, columns=COLUMNS):
    from fmkernels.triton_kernels.probe_dot import probe_dot

    probe_dot(KEY, empty(4, rows, columns, dtype=dtype), distribution, 0, 0)


def stage(dtype, terms=6, rows=ROWS, columns=COLUMNS, nudge=0):
    from fmkernels.triton_kernels.runge_kutta_stage import runge_kutta_stage

    y, times = empty(rows, columns, dtype=dtype), empty(2, rows, dtype=torch.float64)
    runge_kutta_stage(y, [y] * terms, times, 0, empty(7, 1 + terms, dtype=torch.float64), 1, nudge)


def step(dtype, columns, terms=6, rows=ROWS, outputs=0, components=1, by_element=False, segments=1, ratio=False):
    from fmkernels.triton_kernels.runge_kutta_step import runge_kutta_step_

    def table(*shape, dtype=torch.float64):
        return empty(*shape, dtype=dtype)

    y, tolerance = empty(rows, columns, dtype=dtype), table(1, columns // components if by_element else 1)
    runge_kutta_step_(
        y, y, [y] * (terms - 1), table(7, rows), table(6, rows, dtype=torch.int32), table(2 + 4 * (outputs > 0), terms),
        table(14), tolerance, tolerance, table(segments, 2, dtype=torch.int64), components,
        empty(rows) if ratio else None, table(outputs) if outputs else None,
        empty(rows, outputs, columns, dtype=dtype) if outputs else None,
    )  # fmt: skip


def marginal(dtype, columns=COLUMNS, weighted=False):
    from fmkernels.triton_kernels.marginal_field import marginal_field

    numbers = (empty(n, dtype=torch.float64) for n in (ROWS, ROWS, 5000))
    alpha, sigma, log_weights = numbers
    data = empty(5000, columns, dtype=dtype)
    marginal_field(
        empty(ROWS, columns, dtype=dtype), alpha, sigma, data, log_weights if weighted else None, None, None
    )  # fmt: skip


# name -> (the op's launches, tensors of the data's size that are read, and written)
KERNELS = {
    "noise": (noise, 0, 1),
    "path, recompute": (path, 1, 1),
    "path, store": (lambda dtype: path(dtype, STORE_X0), 1, 2),
    "path, x0 given": (lambda dtype: path(dtype, x0=True), 2, 1),
    "loss, recompute": (loss, 2, 1),
    "loss, store": (lambda dtype: loss(dtype, x0=True), 3, 1),
    "scale": (scale, 1, 1),
    "guided": (guided, 3, 1),
    "flow": (flow, 3, 2),
    "flow, affine": (lambda dtype: flow(dtype, "affine"), 2, 2),
    "probe": (probe, 0, 1),
    "probe dot": (probe_dot, 1, 0),
    "stage": (stage, 7, 1),
}
MORE = {
    "path, LogitNormal": lambda: path(F32, timesteps=fmk.LogitNormal(stratified=True)),
    "path, Beta": lambda: path(F32, timesteps=fmk.Beta()),
    "path, VP, f64": lambda: path(torch.float64, schedule=fmk.VP()),
    "path, Polynomial": lambda: path(F32, schedule=fmk.Polynomial(2.5), timesteps=fmk.CosMap()),
    "path, bridge": lambda: path(BF16, schedule=fmk.SchrodingerBridge(1.0), timesteps=fmk.Mode()),
    "loss, f64": lambda: loss(torch.float64),
    "loss, bf16 prediction": lambda: loss(F32, prediction=BF16),
    "loss, mask a run": lambda: loss(F32, mask=(ROWS, COLUMNS // 4)),
    "flow, target": lambda: flow(BF16, "target"),
    "flow, target, f64": lambda: flow(torch.float64, "target"),
    "flow, short rows": lambda: flow(F32, "bridge", 1 << 20, 2),
    "probe, normal": lambda: probe(BF16, 1),
    "probe, Hadamard": lambda: probe(torch.float64, 2),
    "probe, short rows": lambda: probe(F32, 2, 1 << 20, 3),
    "probe dot, normal": lambda: probe_dot(BF16, 1),
    "probe dot, Hadamard": lambda: probe_dot(torch.float64, 2),
    "probe dot, short rows": lambda: probe_dot(F32, 2, 1 << 20, 40),
    "stage, dopri8": lambda: stage(F32, 12),
    "stage, f64": lambda: stage(torch.float64, 12),
    "stage, nudged": lambda: stage(BF16, 3, 1 << 20, 3, nudge=1),
    "step, f64": lambda: step(torch.float64, 3072, outputs=10),
    "step, dopri8": lambda: step(F32, 4095, 13, outputs=10),
    "step, dopri8, long": lambda: step(BF16, COLUMNS, 13, outputs=10),
    "step, short rows": lambda: step(F32, 2, 13, 1 << 20, outputs=10),
    "step, short rows, f64": lambda: step(torch.float64, 3, 13, 1 << 20, outputs=10),
    "step, complex": lambda: step(F32, 3072, components=2, by_element=True, segments=2),
    "step, ratio given": lambda: step(F32, 3072, ratio=True),
    "guided, by row": lambda: guided(F32, BF16, per_row=True),
    "guided, rescaled": lambda: guided(F32, rescale=0.7),
    "guided, rescaled, bf16": lambda: guided(BF16, rescale=0.7, per_row=True),
    "guided, rescaled, f64": lambda: guided(torch.float64, rescale=0.7),
    "marginal": lambda: marginal(F32),
    "marginal, few columns": lambda: marginal(F32, 2, weighted=True),
    "marginal, f64": lambda: marginal(torch.float64, weighted=True),
    "loss, mask an element": lambda: loss(torch.float16, mask=(ROWS, COLUMNS)),
}


# name -> (the op's launches, tensors of the data's size that each of them reads, and writes)
STEPS = {
    "step": (lambda dtype: step(dtype, 3072), [(14, 2)]),  # twice: the second time from a cache
    "step, output": (lambda dtype: step(dtype, 3072, outputs=10), [(21, 3)]),
    "step, long": (lambda dtype: step(dtype, COLUMNS), [(7, 0), (7, 2)]),
}


def kernel_modules():
    from fmkernels.triton_kernels import KERNELS

    names = sorted({module for module, _ in KERNELS.values()})
    return [importlib.import_module(f"fmkernels.triton_kernels.{name}") for name in names]


@pytest.fixture
def launches(monkeypatch):
    """Records launches instead of running them: ``launches(call, …)`` returns those of a call."""
    if INTERPRETED:
        pytest.skip("interpreted kernels are not compiled")
    recorded = []

    def record(kernel, programs, *arguments, device, **constants):
        assert 0 < programs < 2**31
        recorded.append(Launch(kernel, arguments, constants))

    for module in kernel_modules():
        monkeypatch.setattr(module, "launch", record)

    def of(call, *arguments):
        recorded.clear()
        call(*arguments)
        return list(recorded)

    return of


def cuobjdump(compiled, option, tmp_path) -> str:
    import triton

    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def resources(compiled, tmp_path, stack: int = 0) -> dict[str, int]:
    """Registers and local memory; asserts that nothing is spilled, or no more than ``stack`` bytes a thread."""
    text = cuobjdump(compiled, "-res-usage", tmp_path)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert set(used) == {"REG", "STACK", "LOCAL"}, text
    assert used["STACK"] <= stack and used["LOCAL"] == 0, f"spills: {used}"
    return used


def instructions(compiled, tmp_path) -> int:
    """Machine instructions of a kernel, padding left out."""
    code = cuobjdump(compiled, "-sass", tmp_path)
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return sum(name != "NOP" for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch, launches, tmp_path):
    print(f"\nsm_{arch}: {'kernel':30} {'dtype':6} registers  instructions an element")
    for name, (call, read, written) in KERNELS.items():
        for label, dtype in DTYPES.items():
            if arch != 90 and dtype == F32:
                continue  # bf16 is the harder one; half the time
            for launch in launches(call, dtype):
                compiled = launch.compile(arch)
                used = resources(compiled, tmp_path)
                title = launch.kernel.__name__ if launch.kernel.__name__ == "total_kernel" else name
                if title != name:
                    print(f"       {title:30} {label:6} {used['REG']:9}")
                    continue
                each = instructions(compiled, tmp_path) / launch.elements
                print(f"       {title:30} {label:6} {used['REG']:9} {each:12.1f}")
                assert each <= 70, "the arithmetic of a normal is about 45 instructions"
                if arch == 90:
                    check_width(compiled, launch, dtype, read, written)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", STEPS)
def test_steps_compile(name, arch, launches, tmp_path):
    """One launch, or two where a row is long; data 16 bytes at a time, and no spills but two numbers of step control:
    ptxas would rather spill them, in some releases, than have one warp fewer on a processor."""
    call, widths = STEPS[name]
    for label, dtype in DTYPES.items():
        for launch, (read, written) in zip(launches(call, dtype), widths, strict=True):
            compiled = launch.compile(arch)
            used = resources(compiled, tmp_path, stack=16)
            print(f"\nsm_{arch}: {name:20} {launch.kernel.__name__:26} {label:6} {used['REG']} registers", end="")
            check_width(compiled, launch, dtype, read, written)


def check_width(compiled, launch, dtype, read, written):
    """Data is read and written 16 bytes at a time, each element once."""
    accesses = Counter(re.findall(r"\b(ld|st)\.global(?:\.\w+)*?\.(v\d\.b\d+)\b", compiled.asm["ptx"]))
    each = launch.elements * dtype.itemsize // THREAD_BYTES
    wanted = {("ld", "v4.b32"): read * each, ("st", "v4.b32"): written * each}
    assert accesses == {access: count for access, count in wanted.items() if count}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_variants_compile(name, launches, tmp_path):
    stack = 16 if "step" in name else 32 if name == "marginal" else 0  # of the latter since Triton 3.8: eight numbers
    for launch in launches(MORE[name]):
        used = resources(launch.compile(90), tmp_path, stack)
        print(f"\n{name:25} {launch.kernel.__name__:22} {used['REG']} registers", end="")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["target", "bridge", "trigonometric"])
def test_conditional_flow_is_rounded_as_written(form, launches, tmp_path):
    """No multiplication is fused with an addition, neither by Triton nor by ptxas: what divides has its own code."""
    (launch,) = launches(flow, F32, form)
    compiled = launch.compile(90)
    assert "fma.rn.f32" not in compiled.asm["ptx"]
    assert ("FFMA" in cuobjdump(compiled, "-sass", tmp_path)) == (form == "target")


def test_every_kernel_is_compiled(launches):
    """A kernel added to a module must be added above."""
    import triton

    defined = {
        name
        for module in kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    compiled = {launch.kernel.__name__ for call, _, _ in KERNELS.values() for launch in launches(call, F32)}
    compiled |= {launch.kernel.__name__ for call in MORE.values() for launch in launches(call)}
    assert compiled == defined


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(1, 1, F32), (1 << 20, 2, F32), (32, 196608, BF16), (7, 1030, torch.float64), (1, 1 << 33, F32), (5, 0, F32)],
)
def test_tiles_cover_the_problem(rows, columns, dtype):
    from fmkernels.triton_kernels._tile import Tile

    tile = Tile.of(rows, columns, dtype)
    row_programs, rest = divmod(tile.programs, tile.column_programs)
    assert rest == 0 and tile.programs < 2**31
    assert 0 <= row_programs * tile.block_rows - rows < tile.block_rows
    span = 4 * tile.block_groups * tile.steps
    assert 0 <= tile.column_programs * span - columns < span or columns == 0
    assert columns % tile.align == 0
