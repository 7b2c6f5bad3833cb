"""The scripts of examples/drop_in: the same training before and after, by the import alone where that is promised."""

import ast
import difflib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "drop_in"
sys.path.insert(0, str(FOLDER))  # as for a script that is run by its path

import compare  # noqa: E402

from fmkernels.integrations import torchcfm  # noqa: E402

PEERS = ("torchcfm", "flow_matching", "torchdiffeq", "diffusers")
TO_THE_BIT = ("torchcfm", "torchcfm, OT", "torchcfm, own hooks", "flow_matching", "diffusers")
# Relative differences that are rounding: of losses over these few steps, and of samples and log-densities. diffusers
# steps in float32 always, and the default times of flow_matching are float32.
LOSSES = {"float32": 2e-6, "float64": 1e-14}
OUTPUTS = {"float32": 5e-4, "float64": 1e-11}
FLOAT32_INSIDE = ("flow_matching", "diffusers", "diffusers, helpers")
PAGE = (ROOT / "docs" / "drop_in.md").read_text()
SHOWN = re.findall(r"<!-- diff: (\w+) (\w+) -->\n```diff\n(.*?)\n```\n<!-- end of diff -->", PAGE, re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size threads only wait for one another
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def originals(style):
    for peer in PEERS:
        if style.startswith(peer):
            pytest.importorskip(peer)
    if "torchcfm" in style:
        pytest.importorskip("torchdiffeq")
        pytest.importorskip("ot")


each_style = pytest.mark.parametrize("style", compare.PAIRS)


@each_style
def test_the_training_is_the_same(style, originals):
    found = compare.curves(style, steps=12)
    for dtype in ("float32", "float64"):
        figures = found[dtype]
        if style in compare.OTHER_DRAWS:
            before, after = figures["means"]
            assert before != after and abs(before - after) < 4 * figures["standard_error"]
            continue
        assert figures["losses"] <= (0 if style in TO_THE_BIT else LOSSES[dtype])
        outside = {name: value for name, value in figures.items() if name != "losses"}
        assert outside or style in ("lightning", "torchcfm, own hooks")
        bound = 1e-6 if style in FLOAT32_INSIDE and dtype == "float64" else OUTPUTS[dtype]
        assert all(value < bound for value in outside.values()), outside


@pytest.mark.parametrize("style", [name for name in compare.PAIRS if name not in ("plain, drawn", "torchdiffeq")])
def test_the_head_is_the_same(style, originals):
    """The gradient that the timed part of a script gives, from one seed; the plan's pairs come from numpy."""
    import numpy

    x1, gradients = torch.linspace(-1, 1, 12).view(6, 2), []
    for script in compare.scripts(style):
        torch.manual_seed(1)
        numpy.random.seed(1)  # noqa: NPY002
        prediction = torch.linspace(1, -1, 12).view(6, 2).requires_grad_()
        compare.head_of(script, x1, prediction)()
        gradients.append(prediction.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().sum() > 0


def without_imports(name):
    """A script's syntax tree, but for what it imports."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return ast.dump(tree)


def imported(name):
    """The modules that a script imports."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    found = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in found} | {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }


@pytest.mark.parametrize("style", compare.IMPORTS_ONLY)
def test_only_the_import_changes(style):
    before, after = compare.PAIRS[style]
    assert without_imports(before) == without_imports(after)
    assert imported(before) & set(PEERS) and "fmkernels" not in imported(before)
    assert "fmkernels" in imported(after) and not imported(after) & set(PEERS)


@pytest.mark.parametrize("name", sorted({name for pair in compare.PAIRS.values() for name in pair}))
def test_scripts_are_short_and_shown(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 70
    assert any(name in pair[:2] for pair in SHOWN)


@pytest.mark.parametrize(("before", "after", "shown"), SHOWN, ids=[f"{b}-{a}" for b, a, _ in SHOWN])
def test_the_page_shows_the_difference_of_the_files(before, after, shown):
    lines = [(FOLDER / f"{name}.py").read_text().splitlines() for name in (before, after)]
    changed = [line for line in difflib.ndiff(*lines) if line[0] in "+-"]
    on_the_page = [line for line in shown.splitlines()[2:] if line[0] in "+-"]
    assert sorted(line[0] + line[2:] for line in changed) == sorted(on_the_page)
    assert shown.splitlines()[:2] == [f"--- {before}.py", f"+++ {after}.py"]


def test_the_page_says_when_a_matcher_is_fused():
    """... and the scripts that are compared are of that size."""
    assert f"below {torchcfm.FEW:,} elements" in PAGE
    for name in ("torchcfm_after", "torchcfm_hooks_after"):
        assert "batches(discs, 64, steps)" in (FOLDER / f"{name}.py").read_text()
    assert 64 * 16 * 16 >= torchcfm.FEW


def test_times_of_a_pair():
    pytest.importorskip("torchdiffeq")
    row = compare.race("plain", "sampler", (8, 2), seconds=0.0)
    assert row["evaluations"] == [100, 100] and row["before_s"] > 0 and row["ratio"] > 0
    assert compare.race("torchdiffeq", "head", (8, 2), 0.0) is None or not hasattr(
        compare.scripts("torchdiffeq"), "head"
    )


def test_the_committed_results_are_whole():
    found = json.loads((ROOT / "docs" / "experiments" / "drop_in.json").read_text())
    assert [row["style"] for row in found["curves"]] == list(compare.PAIRS)
    sizes = {f"{rows}x{columns}" for rows, columns in compare.SIZES}
    for kind in ("heads", "samplers"):
        assert {row["size"] for row in found[kind]} == sizes
    for row in found["curves"]:
        if row["style"] in TO_THE_BIT:
            assert row["float32"]["losses"] == row["float64"]["losses"] == 0, row["style"]


def test_the_command_prints_its_tables(tmp_path, capsys):
    path = tmp_path / "out.json"
    compare.main(["--styles", "plain", "--steps", "4", "--seconds", "0", "--sizes", "1", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "plain" in printed and "256 × 2" in printed and json.loads(path.read_text())["heads"][0]["rounds"] == 5


def test_a_bad_style_is_explained(capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--styles", "keras"])
    assert stopped.value.code == 2 and "keras" in capsys.readouterr().err


def test_numbers_against_peers(tmp_path):
    """The page of the peers: float32 alone, the fastest variant, and likelihoods at equal accuracy too."""
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    peers = {"torch.compile, a": {"ratio": 4.0}, "torch.compile, b": {"ratio": 3.0}, "torchcfm": {"ratio": 5.06}}
    row = {"op": "head", "size": "256x784", "dtype": "float32", "peers": peers}
    scored = {"op": "log_prob", "size": "256x3072", "dtype": "float32"}
    scored["peers"] = {"flow_matching": {"ratio": 2.1}, "tighter": {"ratio": 1.5}}
    rows = [row, {**row, "dtype": "bfloat16"}, {**row, "size": "256x2", "error": "wrong"}, scored]
    document = {"device": "a device", "versions": {"torch": "9.9", "torchcfm": "1.0"}, "build": {}, "results": rows}
    (tmp_path / "device.json").write_text(json.dumps(document))
    text = figures["numbers"]("peers", tmp_path)
    assert "**a device.** torch 9.9, torchcfm 1.0. [device.json](../benchmarks/results/device.json)" in text
    shown = [line for line in text.splitlines() if "×" in line]
    assert shown == [
        "| training head | 256 × 784 | 5.1× | – | – | – | 3.0× |",
        "| `log_prob` | 256 × 3072 | – | 2.1× | – | – | – |",
        "| `log_prob`, equally accurate | 256 × 3072 | – | 1.4× | – | – | – |",
    ]
