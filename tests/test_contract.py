"""The contract of every op in :mod:`contract`: values, metadata, layouts, determinism, splitting, vmap, opcheck."""

import importlib.util
import os

import pytest
import torch
from contract import NOISE, OPS, cases
from contract_op import DEVICES, DTYPES, INTERPRETED, NORMAL_ERROR, eps
from contract_probe import PROBE
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fmkernels import _registration

pytestmark = pytest.mark.usefixtures("poison")

CASES = list(cases())
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_case = pytest.mark.parametrize(
    ("op", "labels"),
    [pytest.param(*case[:2], id=case[2], marks=[pytest.mark.sanitize] * (i % 4 == 0)) for i, case in enumerate(CASES)],
)
# Long rows, many rows and rows of rows: more than one thread, block or vector, and never a multiple of one.
WIDE = {
    "long": ((3, 40_001), 1),
    "many": ((5003, 3), 1),
    "both": ((33, 2051), 1),
    "nested": ((2, 3, 4099), 2),
}


def few_of(op, count, accept=lambda levels: True):
    """``count`` samples of an op, evenly spread over those accepted."""
    chosen = [labels for o, labels, _ in CASES if o is op and accept(op.levels(labels))]
    return chosen[:: max(1, len(chosen) // count)][:count]


def few_fitting(op, count, shape):
    """As :func:`few_of`, of those that may have another shape."""
    return few_of(op, count, lambda levels: op.valid({**levels, "shape": shape}))


def metadata(value):
    """Shape, dtype, device and strides, those of dimensions of size 1 left out: they say nothing."""
    strides = [stride for size, stride in zip(value.shape, value.stride()) if size != 1 and value.numel()]
    return value.shape, value.dtype, value.device, strides


def check_values(op, arguments, outputs=None):
    """Each output is as near to the fp64 oracle as twice the reference's error, its rounding and the oracle's slack."""
    outputs = op.run(arguments) if outputs is None else outputs
    reference, expected = op.expected(arguments, outputs)
    assert len(outputs) == len(reference) == len(expected)
    held = [*tree_leaves(arguments), *outputs]
    held = [t.untyped_storage().data_ptr() for t in held if isinstance(t, torch.Tensor) and t.numel()]
    assert len(held) == len(set(held)), "an output shares memory with an input or another output"
    for i, (output, other, want) in enumerate(zip(outputs, reference, expected)):
        assert metadata(output) == metadata(other)
        assert output.is_contiguous()
        if want is None:
            assert output.numel() == 0
            continue
        assert output.shape == want.value.shape
        assert not want.value.isnan().any(), "the oracle itself is NaN"
        error = (output.double() - want.value).abs()
        allowed = torch.zeros_like(error)
        if not want.exact:
            rounding = eps(output.dtype) * (want.value.abs() + torch.finfo(output.dtype).smallest_normal)
            allowed = 2 * (other.double() - want.value).abs() + rounding + want.slack
        wrong = ~((error <= allowed) | (output.double() == want.value))
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            pytest.fail(
                f"{op.name}, output {i}: {int(wrong.sum())} of {output.numel()} elements off, first {where}: got "
                f"{output[where].item()!r}, expected {want.value[where].item()!r}, reference {other[where].item()!r}, "
                f"error {error[where].item():.3g}, allowed {allowed[where].item():.3g}"
            )


def assert_equal_bits(outputs, others):
    for output, other in zip(outputs, others, strict=True):
        torch.testing.assert_close(output, other, rtol=0, atol=0, equal_nan=True)


def assert_equal_but_for_sums(output, other, ulps):
    """Equal to the bit, or with ``ulps`` > 0 to that many of the arithmetic, and one of the output's rounding."""
    few = ulps * eps(torch.float64 if output.dtype == torch.float64 else torch.float32) + (ulps > 0) * eps(output.dtype)
    torch.testing.assert_close(output, other, rtol=few, atol=few, equal_nan=True)


def test_every_op_is_in_the_contract():
    assert {op.name for op in OPS} == set(_registration.references)


@each_op
def test_the_backend_asked_for_answers(op, device):
    answers = _registration.answering(op.name, device.type)
    if _registration.backend() in ("reference", "triton"):
        assert answers == _registration.backend()
    elif device.type == "cpu":
        assert answers == ("cpp" if _registration.library_path().exists() else "reference")
    else:
        assert answers != "reference" or importlib.util.find_spec("triton") is None


@each_case
def test_values(op, labels, device):
    check_values(op, op.make(op.levels(labels), device))


@pytest.mark.parametrize(
    ("op", "labels"), [pytest.param(*case[:2], id=case[2]) for case in CASES if not case[0].mutates]
)
def test_fake_outputs_have_the_real_metadata(op, labels, device):
    arguments = op.make(op.levels(labels), device)
    with FakeTensorMode() as mode:
        fakes = op.run(tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for fake, real in zip(fakes, op.run(arguments), strict=True):
        assert metadata(fake) == metadata(real)


def transposed(value):
    return value.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(value):
    wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1] + 1, dtype=value.dtype, device=value.device)
    wide[..., 1::2] = value
    return wide[..., 1::2]


def misaligned(value):
    """Contiguous, but beginning one element after a boundary that vector loads need."""
    memory = torch.zeros(value.numel() + 1, dtype=value.dtype, device=value.device)
    memory[1:] = value.reshape(-1)
    return memory[1:].view(value.shape)


def expanded(value):
    return value[:1].expand(value.shape)


LAYOUTS = {f.__name__: f for f in (transposed, sliced, misaligned, expanded)}


def lay_out(op, arguments, layout):
    """The arguments with every tensor of at least one dimension laid out anew, but the key and what is overwritten."""

    def apply(value):
        return layout(value) if value.dim() and value.dtype != torch.int64 and value.numel() else value

    kept = op.mutates + (op.paired if layout is expanded else ())
    return tuple(value if i in kept else tree_map_only(torch.Tensor, apply, value) for i, value in enumerate(arguments))


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
@each_op
def test_layouts(op, layout, device):
    shapes = [((3, 7), 1), ((4, 3, 5), 2), ((2, 1031), 1), ((37, 2), 1)][: 2 if INTERPRETED else 4]
    for i, shape in enumerate(shapes):
        fitting = few_fitting(op, 4, shape)
        labels = fitting[i % len(fitting)]
        arguments = op.make(op.levels(labels, shape=shape), device)
        strided = lay_out(op, arguments, LAYOUTS[layout])
        plain = tree_map_only(torch.Tensor, lambda a: a.contiguous().clone(), strided)
        # A reference sums in the order of memory; kernels lay out anew.
        ulps = op.sum_ulps if _registration.answering(op.name, device.type) == "reference" else 0
        for output, other in zip(op.run(strided), op.run(plain), strict=True):
            assert_equal_but_for_sums(output, other, ulps)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", ["3x7"] if INTERPRETED else WIDE)
@each_op
def test_same_bits_from_run_to_run_and_on_any_number_of_threads(op, shape, device):
    slow = _registration.answering(op.name, device.type) == "reference" or INTERPRETED
    shape = WIDE.get(shape, ((3, 7), 1))
    for labels in few_fitting(op, 1 if slow else 3, shape):
        arguments = op.make(op.levels(labels, shape=shape), device)
        outputs = op.run(arguments)
        check_values(op, arguments, outputs)
        assert_equal_bits(op.run(arguments), outputs)
        threads = torch.get_num_threads()
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert_equal_bits(op.run(arguments), outputs)
        finally:
            torch.set_num_threads(threads)


def row_by_row(levels):
    return levels["shape"][1] == 1 and levels["shape"][0][0] > 1 and levels.get("reduction", "none") == "none"


ROWWISE = pytest.mark.parametrize("op", [op for op in OPS if op.part], ids=lambda op: op.name)


@pytest.mark.sanitize
@ROWWISE
def test_a_row_alone_equals_the_row_in_its_batch(op, device):
    for labels in few_of(op, 3 if INTERPRETED else 24, row_by_row):
        arguments = op.make(op.levels(labels), device)
        whole = op.run(arguments)
        rows = op.levels(labels)["shape"][0][0]
        for row in {0, rows // 2, rows - 1}:
            alone = op.run(op.part(arguments, row))
            for output, one in zip(whole, alone, strict=True):
                if output.shape[op.row_dim : op.row_dim + 1] == (rows,):
                    assert_equal_but_for_sums(output.narrow(op.row_dim, row, 1), one, op.sum_ulps)


@pytest.mark.large
@ROWWISE
def test_more_than_2_to_31_elements(op, device):
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < 60e9:
        pytest.skip(f"needs 64 GB of memory, there are {memory / 1e9:.0f}")
    if _registration.answering(op.name, device.type) == "reference":
        pytest.skip("references hold many int64 tensors of that size")
    torch.use_deterministic_algorithms(False)  # filling memory of this size takes longer than the kernel
    shape, dims = (3, 2**30 + 3), 1
    (labels,) = few_of(op, 1, lambda levels: row_by_row(levels) and levels.get("times") not in DTYPES.values())
    levels = op.levels(labels, shape=((3, 5), dims))
    levels |= {"dtype": torch.bfloat16, "dtypes": (torch.bfloat16, torch.bfloat16, torch.float32)}
    levels |= {"first_row": 0, "mask": "no_mask", "gradient": True, "source": "drawn", "store": False}
    levels |= {"distribution": "normal", "probes": 1}
    levels |= {"ks": 2, "segments": "leading", "tolerance": "scalar", "components": 1, "t_eval": "none"}
    arguments = op.make(levels, device)
    if op in (NOISE, PROBE):  # no tensor to repeat
        arguments = op.make({**levels, "shape": (shape, dims)}, device)
    else:
        wide = lambda a: a[..., :1].repeat_interleave(shape[1], -1) if a.shape[-2:] == (3, 5) else a  # noqa: E731
        arguments = tree_map_only(torch.Tensor, wide, arguments)
    whole, alone = op.run(arguments), op.run(op.part(arguments, 2))
    for output, one in zip(whole, alone, strict=True):
        if output.shape[op.row_dim : op.row_dim + 1] == (3,):
            assert_equal_but_for_sums(output.narrow(op.row_dim, 2, 1), one, op.sum_ulps)


SHAPE = st.lists(st.integers(0, 9), max_size=4).flatmap(
    lambda shape: st.tuples(st.just(tuple(shape)), st.integers(0, len(shape)))
)


@each_op
@settings(max_examples=4 if INTERPRETED else 40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_dtype_stride_and_coefficients(op, data):
    labels = {name: data.draw(st.sampled_from(list(levels)), label=name) for name, levels in op.factors.items()}
    levels = op.levels(labels, shape=data.draw(SHAPE, label="shape"), seed=data.draw(st.integers(0, 99), label="seed"))
    assume(op.valid(levels))
    arguments = op.make(levels, data.draw(st.sampled_from(DEVICES), label="device"))
    layout = data.draw(st.sampled_from([None, *LAYOUTS]), label="layout")
    check_values(op, lay_out(op, arguments, LAYOUTS[layout]) if layout else arguments)


@each_op
def test_opcheck(op, device):
    def accept(levels):  # the PyTorch form of a stratified permutation takes 30 s to trace
        return 0 not in levels["shape"][0] and not getattr(levels.get("times"), "stratified", False)

    for labels in few_of(op, 1 if INTERPRETED else 4, accept):
        arguments = op.make(op.levels(labels), device)
        if op.functions(device):
            arguments = tree_map_only(torch.Tensor, lambda a: a.requires_grad_(a.is_floating_point()), arguments)
        torch.library.opcheck(op.overload, arguments)


@each_op
def test_vmap_equals_a_loop(op, device):
    """Over every tensor argument at once, keys too."""
    for labels in few_of(op, 2 if INTERPRETED else 8, lambda levels: 0 not in levels["shape"][0]):
        batch = [op.make(op.levels(labels, seed=seed), device) for seed in range(3)]
        stacked = tree_map(lambda *a: torch.stack(a) if isinstance(a[0], torch.Tensor) else a[0], *batch)
        in_dims = tree_map(lambda a: 0 if isinstance(a, torch.Tensor) else None, stacked)
        outputs = torch.vmap(lambda *arguments: op.run(arguments), in_dims=in_dims)(*stacked)
        loop = [torch.stack(column) for column in zip(*(op.run(arguments) for arguments in batch))]
        for output, want in zip(outputs, loop, strict=True):
            tolerance = max(1e-3, 4 * eps(output.dtype))
            torch.testing.assert_close(output, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_wrong_value_is_found(device):
    """The comparison itself: one element off by a little is an error."""
    arguments = NOISE.make(NOISE.levels(NOISE.cover()[0]), device)
    (spoilt,) = NOISE.run(arguments)
    spoilt.view(-1)[-1] += 16 * NORMAL_ERROR[torch.float32]
    with pytest.raises(pytest.fail.Exception, match="1 of"):
        check_values(NOISE, arguments, (spoilt,))
