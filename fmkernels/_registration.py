"""Registration of the ops: the one file that touches torch's private dispatch names.

The reference of an op is registered as ``CompositeExplicitAutograd`` (specification, fallback on any device) and at
``FuncTorchBatched`` (vmap rule). C++ libraries and Triton add ``CPU`` and ``CUDA``. ``torch.library.register_autograd``
is not used: with it forward-mode tangents come out silently zero.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    raise ImportError(
        f'fmkernels needs torch 2.11 or later, found {torch.__version__}: pip install --upgrade "torch>=2.11"'
    )
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

# A build for the Hugging Face hub brings _ops, which loads its library, under a namespace of its own.
HUB = importlib.util.find_spec("._ops", __package__) is not None
NAMESPACE = importlib.import_module("._ops", __package__).add_op_namespace_prefix("")[:-2] if HUB else "fmkernels"
BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")

library = torch.library.Library(NAMESPACE, "DEF")
ops = getattr(torch.ops, NAMESPACE)
references: dict[str, Callable[..., Any]] = {}
_backends: dict[tuple[str, str], str] = {}  # (op, device type) -> backend that answers
problems: list[str] = []  # why a compiled backend is missing, for `python -m fmkernels info`
BUILD = (
    "The references answer in its place. To build it, where g++ or another C++20 compiler is: "
    'pip install --upgrade "setuptools>=77" ninja pybind11, then in the source folder '
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)

below_autograd = torch._C._AutoDispatchBelowAutograd
nothing = contextlib.nullcontext


def backend() -> str:
    """The backend asked for by FMK_BACKEND: "auto" unless set."""
    name = os.environ.get("FMK_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"FMK_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any] | None, *, tags: Sequence[torch.Tag] = ()
) -> None:
    """Define an op by its schema and reference; ``fake`` gives the outputs' metadata without computing."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=tags)
    library.impl(name, reference, "CompositeExplicitAutograd")
    library.impl(name, reference, "FuncTorchBatched")
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    references[name] = reference


def autograd(name: str, kernel: Callable[..., Any]) -> None:
    """Register the Autograd-key kernel of an op."""
    library.impl(name, kernel, "Autograd")


def override(name: str, kernel: Callable[..., Any], device_type: str, backend_name: str) -> None:
    """Let ``kernel`` answer an op on a device type, above what the compiled library registered."""
    with warnings.catch_warnings():  # that the compiled kernel is overridden is what is wanted
        warnings.simplefilter("ignore", UserWarning)
        library.impl(name, kernel, {"cpu": "CPU", "cuda": "CUDA"}[device_type], allow_override=True)
    _backends[name, device_type] = backend_name


def overload(name: str) -> Any:
    return getattr(ops, name).default


def transforming() -> bool:
    """Whether a functorch transform or forward-mode differentiation is active."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def within_torch_func() -> bool:
    """Whether a functorch transform is active."""
    return peek_interpreter_stack() is not None


def only_grad() -> bool:
    """Whether every active transform is of reverse mode, such as torch.func.grad."""
    stack = get_interpreter_stack() or ()
    return forward_ad._current_level < 0 and all(one.key() == TransformType.Grad for one in stack)


def batched(tensor: torch.Tensor) -> bool:
    """Whether vmap maps over a tensor."""
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """For tensors that are kept: made inside a transform or inference mode they would be of no use after it."""
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False):
        yield


def eager() -> bool:
    """Whether plain eager execution is under way: not compiling, tracing or transforming."""
    return not (torch.compiler.is_compiling() or torch._C._is_tracing()) and not transforming()


def clamp_time(t: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """t within [low, high], of derivative 1 at both ends too, where torch.clamp's is 0 from torch 2.14 on."""
    if eager() and not t.requires_grad:
        return t.clamp(low, high)
    return torch.where(t < low, low, torch.where(t > high, high, t))


def requires_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def may_write_in_place(tensor: torch.Tensor, incoming: torch.Tensor) -> bool:
    """Whether a backward may overwrite ``tensor`` with what it makes of ``incoming``: the graph is not kept, nothing
    traces or wraps the tensor, and ``incoming`` is one gradient, not a batch of them."""
    return (
        type(tensor) is torch.Tensor
        and not is_legacy_batchedtensor(incoming)
        and peek_interpreter_stack() is None
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
    )


def library_path() -> Path:
    return Path(os.environ.get("FMK_LIBRARY") or Path(__file__).parent / "_C.so")


def load_compiled() -> None:
    """Load the compiled library, if it is there and asked for; what went wrong is kept for ``info``, and what was asked
    for or installed and cannot be had is warned about."""
    path, name = library_path(), backend()
    if HUB:
        return
    if name == "reference":
        problems.append("compiled library not loaded: FMK_BACKEND=reference")
    elif not path.exists():
        problem = f"compiled library not built: {path} is missing"
        if os.environ.get("FMK_LIBRARY"):
            _warn(f"{problem}, which FMK_LIBRARY names: correct or unset it")
        elif name in ("cpp", "cuda"):
            _warn(f"{problem}, and FMK_BACKEND={name} asks for it. {BUILD}")
        else:
            problems.append(f"{problem}. {BUILD}")
    else:
        try:
            refuse_cut_short(path)
            torch.ops.load_library(str(path))
        except OSError as error:
            _warn(
                f"compiled library {path} does not load into torch {torch.__version__}: {error.__cause__ or error}. "
                f"It is damaged, or was built for a later torch or another machine. {BUILD}"
            )
            return
        absent = [op for op in references if answering(op, "cpu") == "reference"]
        if absent:
            problems.append(f"compiled library {path} is older than the package, without {', '.join(absent)}. {BUILD}")


def refuse_cut_short(path: Path) -> None:
    """OSError for a file that ends before its ELF section headers do: mapping it would end the process by SIGBUS."""
    with path.open("rb") as file:
        head = file.read(64)
    start, size, count = (int.from_bytes(head[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    if head[:4] == b"\x7fELF" and path.stat().st_size < max(64, start + size * count):
        raise OSError("file too short: it was not written to its end")


def _warn(problem: str) -> None:
    problems.append(problem)
    warnings.warn(f"fmkernels: {problem}", RuntimeWarning, stacklevel=2)


def choose_backends() -> None:
    """Let Triton answer on CUDA: everything, or what has no CUDA C++ where that is asked for. Interpreted, where that
    is asked for, on the CPU too."""
    name, interpreted = backend(), os.environ.get("TRITON_INTERPRET") == "1"
    # Whether a GPU is there is not asked: that would initialise CUDA in a process that may still fork.
    device_types = ["cuda"] if name != "reference" and torch.backends.cuda.is_built() else []
    if name == "triton" and interpreted:
        device_types.append("cpu")
    found = importlib.util.find_spec("triton") is not None
    if name == "triton" and not (found and device_types):
        raise RuntimeError(
            "FMK_BACKEND=triton: expected triton, and a CUDA build of torch or TRITON_INTERPRET=1 to interpret the "
            f"kernels on the CPU; got triton {'installed' if found else 'not installed'}, torch {torch.__version__}"
        )
    if not found and device_types:
        problems.append("Triton kernels not used on CUDA: triton is not installed (pip install triton)")
        return
    for device_type in device_types:
        kernels = importlib.import_module(".triton_kernels", __package__)
        kernels.register(device_type, kernels.KERNELS if name in ("auto", "triton") else kernels.WITHOUT_CUDA)


def answering(name: str, device_type: str) -> str:
    """Which backend answers an op on a device type: "cpp", "cuda", "triton" or "reference"."""
    if (name, device_type) in _backends:
        return _backends[name, device_type]
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        return {"cpu": "cpp", "cuda": "cuda"}[device_type]
    return "reference"


def build_facts() -> dict[str, Any]:
    """What the compiled library says of its build; empty where none is loaded."""
    with contextlib.suppress(AttributeError):  # no such op
        return json.loads(ops.build_info())
    return {}
