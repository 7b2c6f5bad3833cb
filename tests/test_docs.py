"""The documentation is true: its examples run, its links lead somewhere, its numbers are the committed ones."""

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

import fmkernels as fmk
from fmkernels import _registration, distributed, layers, objectives
from fmkernels.integrations import diffusers, flow_matching, torchcfm, torchdiffeq
from fmkernels.matching import NOISE_MODES
from fmkernels.solvers._problem import STATUSES
from fmkernels.solvers.solve import CONTROLLERS, GRADIENTS
from fmkernels.solvers.tableaus import ADAPTIVE, FIXED

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_of(text):
    """The Python blocks of a page in one program, each line at its own number."""
    language, lines = None, []
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if language == "python" and not fence else "")
        if fence:
            language = line.removeprefix("```").strip() if language is None else None
    return "\n".join(lines)


def anchors_of(text):
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_of(page.read_text()), page, "exec"), {"__name__": "__main__"})


@each_page
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(linked.read_text()), f"{page.name} links to {target}"


@each_page
def test_numbers_are_those_of_the_results(page, figures):
    assert page.read_text() == figures.filled(page.read_text()), "run python docs/figures.py"


def test_numbers_are_asked_for(figures):
    pages = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"<!-- numbers: (\w+) -->", pages)) == set(figures.SECTIONS)


def test_rendered_numbers(figures, tmp_path):
    variants = (("randn inside", 4.04), ("randn outside", 3.04))
    peers = {
        f"torch.compile, {variant}": {"ratio": ratio, "ratio_less_baseline": ratio + 1, "peak_bytes": 2_000_000}
        for variant, ratio in variants
    }
    row = {
        "op": "head", "size": "256x2", "dtype": "bfloat16", "bytes": 9, "median_s": 1.5e-3, "of_copy": 0.625,
        "peak_bytes": 12_345, "baseline_s": 2e-5, "peers": peers,
    }  # fmt: skip
    document = {
        "device": "a device", "versions": {"torch": "9.9", "torchcfm": None}, "build": {"compiler": None},
        "commit": "abc", "results": [row, {**row, "op": "noise", "peers": {}}, {"op": "head", "error": "wrong"}],
    }  # fmt: skip
    (tmp_path / "device.json").write_text(json.dumps(document))
    end = "<!-- end of numbers -->"
    page = f"# Kept\n<!-- numbers: head -->\nold\n{end}\nkept\n<!-- numbers: ops -->{end}\n"
    text = figures.filled(page, tmp_path)
    assert text.startswith("# Kept\n") and "\nkept\n" in text and "old" not in text
    assert "**a device.** torch 9.9, commit abc." in text
    assert "| head | 256 × 2 | bf16 | 1.5 ms | 62% | 12.35 kB | 3.0× |" in text  # the fastest variant
    assert "- 256 × 2 bf16, less an empty backward, 20 µs in each: torch.compile 4.0×." in text
    assert "torch.compile 2 MB." in text
    assert "| noise | 256 × 2 | bf16 | 1.5 ms | 62% | 12.35 kB |" in text
    assert figures.filled(text, tmp_path) == text
    assert "odeint" not in text
    (tmp_path / "device.json").unlink()
    assert text != figures.filled(text, tmp_path) and figures.NOTHING in figures.filled(text, tmp_path)


def test_rendered_numbers_of_the_solvers(figures, tmp_path):
    row = {"size": "256x2", "dtype": "float64", "median_s": 3e-5, "calls": 602}
    rows = [
        {**row, "op": "odeint", "peers": {"torchdiffeq": {"ratio": 9.06}}},
        {**row, "op": "solve", "peers": {"torchdiffeq": {"ratio": 8.0}, "torchode": {"ratio": 12.34}}},
        {**row, "op": "solve_large", "size": "4096x256", "of_copy": 0.625, "peers": {}},
        {"op": "solve", "size": "256x2", "dtype": "float32", "error": "wrong"},
    ]
    versions = {"torch": "9.9", "torchcfm": "1.0", "torchdiffeq": "0.2", "torchode": None}
    document = {"device": "a device", "versions": versions, "build": {}, "commit": "abc", "results": rows}
    (tmp_path / "device.json").write_text(json.dumps(document))
    pages = [f"<!-- numbers: {name} -->\nold\n<!-- end of numbers -->" for name in ("solvers", "ops", "head")]
    text, *others = (figures.filled(page, tmp_path) for page in pages)
    assert "**a device.** torch 9.9, torchdiffeq 0.2, commit abc." in text and "old" not in text
    assert "| solver | batch | dtype | time outside f | of a copy | evaluations | torchdiffeq | torchode |" in text
    assert "| odeint | 256 × 2 | fp64 | 30 µs | – | 602 | 9.1× | – |" in text
    assert "| solve | 256 × 2 | fp64 | 30 µs | – | 602 | 8.0× | 12.3× |" in text
    assert "| solve_large | 4096 × 256 | fp64 | 30 µs | 62% | 602 | – | – |" in text and "wrong" not in text
    assert all(figures.NOTHING in other for other in others), "solvers are no ops"


def test_rendered_numbers_of_likelihoods(figures, tmp_path):
    row = {"size": "256x3072", "dtype": "float32", "median_s": 1.25, "calls": 32, "of_bare": 1.04}
    peer = {"ratio": 2.31, "calls": 50}
    rows = [
        {**row, "op": "log_prob", "peers": {"bare": peer, "flow_matching": peer}},
        {**row, "op": "divergence", "calls": 1, "peers": {"bare": peer, "forward": {"ratio": 1.5, "calls": 1}}},
        {"op": "divergence", "size": "256x64", "dtype": "float32", "error": "wrong"},
    ]
    document = {
        "device": "a device",
        "versions": {"torch": "9.9", "flow_matching": "1.0"},
        "build": {},
        "results": rows,
    }
    (tmp_path / "device.json").write_text(json.dumps(document))
    pages = [f"<!-- numbers: {name} -->\nold\n<!-- end of numbers -->" for name in ("likelihood", "ops", "head")]
    text, *others = (figures.filled(page, tmp_path) for page in pages)
    assert "**a device.** torch 9.9, flow_matching 1.0." in text and "old" not in text and "wrong" not in text
    assert "| case | batch | dtype | time | of the bare calls | evaluations | flow_matching |" in text
    assert "| log_prob | 256 × 3072 | fp32 | 1250 ms | 1.04× | 32 | 2.3× |" in text
    assert "| divergence | 256 × 3072 | fp32 | 1250 ms | 1.04× | 1 | 1.5× |" in text
    assert "Evaluations of the others: flow_matching 50." in text
    assert all(figures.NOTHING in other for other in others), "likelihoods are no ops"


def test_pictures_are_drawn(figures, tmp_path):
    figures.draw(tmp_path)
    for name in figures.PICTURES:
        assert (tmp_path / name).stat().st_size > 20_000
        assert (ROOT / "docs" / name).exists(), "run python docs/figures.py"


PUBLIC = {name: getattr(fmk, name) for name in fmk.__all__ if name not in ("ops", "layers")}
PUBLIC |= {f"ops.{name}": getattr(fmk.ops, name) for name in fmk.ops.__all__}
for module in (distributed, layers, diffusers, flow_matching, torchcfm, torchdiffeq):
    own = (name for name in module.__all__ if getattr(module, name).__module__.startswith("fmkernels"))
    PUBLIC |= {f"{module.__name__.removeprefix('fmkernels.')}.{name}": getattr(module, name) for name in own}
PUBLIC |= {f"FlowMatching.{name}": getattr(fmk.FlowMatching, name) for name in ("sample", "loss", "velocity", "named")}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring(name):
    value = PUBLIC[name]
    doc = (vars(value).get("__doc__") if isinstance(value, type) else value.__doc__) or ""
    assert len(doc.strip()) > 20, f"{name} has no docstring"
    assert not doc.startswith(f"{name.split('.')[-1]}("), f"{name}: its docstring is its signature"


@pytest.mark.parametrize("name", ["FlowMatching", *(name for name in PUBLIC if not isinstance(PUBLIC[name], type))])
def test_docstrings_name_every_argument(name):
    value = PUBLIC[name]
    doc = inspect.getdoc(value)
    for argument in inspect.signature(value).parameters.values():
        if argument.kind != argument.VAR_KEYWORD and argument.name != "self":
            assert re.search(rf"\b{argument.name}\b", doc), f"{name}: its docstring does not name {argument.name}"


def descriptions(base):
    classes = {name: value for name, value in PUBLIC.items() if isinstance(value, type)}
    return [name for name, value in classes.items() if issubclass(value, base) and value is not base]


def strings(*names):
    return [f'"{name}"' for name in names if name != "none"]


SETUP = (ROOT / "setup.py").read_text().split('"""')[1]
LISTED = [
    *descriptions(fmk.Schedule),
    *descriptions(fmk.TimestepSampler),
    *strings(*objectives.PREDICTIONS, *objectives.WEIGHTS, *objectives.RHOS, *objectives.NAMED, *NOISE_MODES),
    *strings(*ADAPTIVE, *FIXED, *CONTROLLERS, *GRADIENTS),
    *(f"`{name}`" for name in (*fmk.ops.__all__, *_registration.BACKENDS) if name.islower()),
    *(f"make {target}" for target in ("demo", "test", "sanitize", "bench", "gpu")),
    *dict.fromkeys(re.findall(r"FMK_[A-Z]+|MAX_JOBS|TORCH_CUDA_ARCH_LIST", SETUP)),
]


@pytest.mark.parametrize("word", LISTED)
def test_the_readme_lists(word):
    assert word in README


SOLVERS = (ROOT / "docs" / "solvers.md").read_text()
SOLVER_WORDS = [
    *(f"`{name}`" for name in (*ADAPTIVE, *FIXED)),
    *(f'`"{name}"`' for name in (*CONTROLLERS, *GRADIENTS)),
    *torchdiffeq.__all__,
    *(text for code, text in STATUSES.items() if code >= 0),
]


@pytest.mark.parametrize("word", SOLVER_WORDS)
def test_the_page_of_the_solvers_lists(word):
    assert word in SOLVERS


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_page_of_the_solvers_has_the_evaluations_of(name):
    method = ADAPTIVE[name]
    row = next(line for line in SOLVERS.splitlines() if line.startswith(f"| `{name}` |"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == [
        f"{method.order}({method.order - 1})",
        str(len(method.b) - 1),
    ]
