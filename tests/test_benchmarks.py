"""The benchmarks: they verify before they time, count what they say, and refuse figures that cannot be."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fmkernels as fmk  # noqa: E402
from benchmarks import gpu, head, likelihood, marginal, measure, peers, plot, probes, run, sampling  # noqa: E402

CPU = torch.device("cpu")
OPS = head.OPS | sampling.OPS | probes.OPS


def tiny(op="head", rows=16, columns=8, dtype=torch.float32):
    return OPS[op](rows, columns, dtype, CPU)


@pytest.fixture
def quick(monkeypatch):
    """A few short rounds; and the memory is taken for as fast as it likes, as so little of it is measured."""
    monkeypatch.setattr(measure, "LAP", 1e-5)
    monkeypatch.setattr(measure, "ROUNDS", (3, 3))
    monkeypatch.setattr(measure, "SETS", 2)
    monkeypatch.setattr(measure, "LIMIT", {"cpu": 1e9})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", head.DTYPES, ids=str)
def test_every_case_measures(op, dtype, quick):
    row = measure.measure(tiny(op, dtype=dtype), peers=["eager", "flow_matching", "torchcfm", "torch.randn"], seconds=0)
    assert "error" not in row, row["error"]
    assert row["rounds"] == 3
    assert row["median_s"] > 0
    assert row["bytes"] == tiny(op).passes * 16 * 8 * dtype.itemsize
    assert all(figures["ratio"] > 0 for figures in row["peers"].values())


def test_marginal_field_measures(quick, monkeypatch):
    monkeypatch.setattr(marginal, "POINTS", 300)
    row = measure.measure(marginal.MarginalField(16, 8, torch.float32, CPU), peers=["eager"], seconds=0)
    assert "error" not in row, row["error"]
    assert row["bytes"] == (300 + 3 * 16) * 8 * 4
    assert set(row["peers"]) == {f"eager, {name}, {rows}" for name in ("products", "cdist") for rows in marginal.CHUNKS}
    ours = marginal.MarginalField.ours
    monkeypatch.setattr(marginal.MarginalField, "ours", lambda self, b: fmk.ops.PosteriorMoments(*(
        value * 1.0001 for value in ours(self, b)
    )))  # fmt: skip
    assert "AssertionError" in measure.measure(marginal.MarginalField(16, 8, torch.float32, CPU), seconds=0)["error"]


@pytest.mark.parametrize("op", likelihood.OPS)
def test_likelihoods_measure(op, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(likelihood, "ROUNDS", 2)
    monkeypatch.setattr(likelihood, "WIDTH", 8)
    monkeypatch.setattr(likelihood, "SIZES", {name: [(8, 6)] for name in likelihood.OPS})
    path = tmp_path / "results.json"
    assert run.main(["--op", op, "--device", "cpu", "--seconds", "0", "--json", str(path)]) == 0
    assert f"{op}: also as a multiple of the bare" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["results"]
    assert row["rounds"] == 2 and row["median_s"] > 0 and row["peak_bytes"] > 0
    assert row["of_bare"] > 0 and all(figures["ratio"] > 0 for figures in row["peers"].values())
    assert row["peers"]["bare"]["calls"] == row["calls"]
    if op == "log_prob":
        assert row["x0_error"] < 1e-3 and row["log_prob_error"] < 1e-2
    wrong = likelihood.OPS[op](8, 6, torch.float32, CPU)
    monkeypatch.setattr(wrong, "ours", lambda norm="state": [value + 1 for value in likelihood.OPS[op].ours(wrong)])
    assert "error" in wrong.measure(seconds=0)


def test_command_runs_pytest_benchmark_and_writes_results(quick, tmp_path, capsys):
    path = tmp_path / "deep" / "results.json"
    options = ["--op", "head", "--size", "256x2", "--dtype", "fp32", "--peers", "eager", "--device", "cpu"]
    assert run.main([*options, "--seconds", "0", "--json", str(path)]) == 0
    assert "less an empty backward" in capsys.readouterr().out
    results = json.loads(path.read_text())
    (row,) = results["results"]
    assert (row["op"], row["size"], row["dtype"], row["device"]) == ("head", "256x2", "float32", "cpu")
    assert row["peers"]["eager"]["ratio_less_baseline"] > 0
    assert results["versions"]["torch"] == torch.__version__
    assert str(ROOT) not in path.read_text()
    plot.speed_up(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_one_core_is_one_core(quick):
    before = torch.get_num_threads()
    assert measure.measure(tiny("sample_path_one_core"), seconds=0)["threads"] == 1
    assert torch.get_num_threads() == before


def test_command_refuses_what_it_does_not_know(capsys):
    for option, value in zip(
        ("--op", "--size", "--size", "--dtype", "--peers"), ("heads", "256", "0x2", "int8", "jax")
    ):
        with pytest.raises(SystemExit):
            run.main([option, value])
        assert value in capsys.readouterr().err


def test_an_op_that_fails_gets_no_time(quick, monkeypatch):
    right = measure.measure(tiny("scale_gradient"), seconds=0)
    assert "median_s" in right
    monkeypatch.setattr(head.Scale, "ours", lambda self, b: b.gradient.mul_(-1.001))
    wrong = measure.measure(tiny("scale_gradient"), seconds=0)
    assert "median_s" not in wrong
    assert wrong["error"].startswith("AssertionError")


@pytest.mark.parametrize("op", ["head", "noise", "sample_path", "matching_loss"])
def test_verification_sees_a_small_mistake(op, monkeypatch):
    case = tiny(op)
    case.verify(case.tensors())
    if op == "noise":
        monkeypatch.setattr(head.Noise, "ours", lambda self, b: head.fmk.ops.noise(b.key, 16, 8, stream="bridge"))
    else:
        right = peers.draw_path
        monkeypatch.setattr(head.peers, "draw_path", lambda x1, x0, t: right(x1, x0, t) + 1e-3)
        formula = head.loss_and_gradient
        monkeypatch.setattr(head, "loss_and_gradient", lambda *a: [1.001 * value for value in formula(*a)])
    with pytest.raises(AssertionError):
        case.verify(case.tensors())


@pytest.mark.parametrize("op", probes.OPS)
def test_verification_sees_another_probe(op, monkeypatch):
    right = getattr(fmk.ops, op)
    monkeypatch.setattr(fmk.ops, op, lambda *arguments, **more: right(*arguments, **more | {"first_probe": 1}))
    case = tiny(op)
    with pytest.raises(AssertionError):
        case.verify(case.tensors())


def test_a_bandwidth_above_the_copys_is_an_error(quick, monkeypatch):
    monkeypatch.setattr(measure, "LIMIT", {"cpu": 0.0})
    assert "of the copy's bandwidth" in measure.measure(tiny("noise"), seconds=0)["error"]


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(300, dtype=torch.uint8)
        return second, third

    assert measure.peak_bytes(call, CPU) == 1500


def test_the_head_that_recomputes_holds_x_t_and_the_gradient():
    case = tiny("head_recompute", rows=16, columns=12288)
    data = case.rows * case.columns * 4
    small = case.rows * (6 + 1) * 4 + 64 * 1024  # table, t, partial sums
    peak = measure.cost(case.ours, case)["peak_bytes"]
    if measure._registration.answering("sample_path", "cpu") != "reference":
        assert 2 * data <= peak <= 2 * data + small


def test_peers_compute_the_same_head():
    x1, prediction = torch.randn(64, 3), torch.randn(64, 3)
    torch.manual_seed(3)
    x_t, loss = peers.eager_head(x1, prediction)
    for name, other in peers.heads().items():
        if not name.startswith("torch.compile"):
            torch.manual_seed(3)
            for ours, theirs in zip((x_t, loss), other(x1, prediction), strict=True):
                torch.testing.assert_close(theirs, ours, msg=lambda text, name=name: f"{name}: {text}")


def test_ratios_are_to_the_fastest_variant():
    row = {"peers": {"a, slow": {"ratio": 3.0}, "a, fast": {"ratio": 2.0}, "b": {"ratio": 4.0}}}
    assert {name: figures["ratio"] for name, figures in run.fastest(row).items()} == {"a": 2.0, "b": 4.0}


def test_results_are_named_by_device(monkeypatch):
    monkeypatch.setattr(run._info, "cpu_name", lambda: "Intel(R) Xeon(R) CPU @ 2.20GHz")
    assert run.slug("cpu") == f"cpu-intel-xeon-cpu-2-20ghz-{torch.get_num_threads()}c"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_gpu_run_says_so_and_writes_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--out", str(tmp_path / "out")])
    assert exit.value.code == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_gpu_run_goes_on_after_a_step_that_fails_or_hangs(tmp_path):
    steps = gpu.Steps(tmp_path)
    assert not steps.run("fails", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 20)
    assert not steps.run("hangs", ["sh", "-c", "echo begun; sleep 60"], 0.5)
    assert steps.run("passes", ["echo", "done"], 20)
    steps.start -= gpu.BUDGET
    assert not steps.run("late", ["true"], 20)
    assert [(step.status, step.note) for step in steps.steps[:3]] == [
        ("failed", "why"), ("timed out", "begun"), ("passed", "done"),
    ]  # fmt: skip
    assert steps.steps[3].status == "timed out"


@pytest.mark.parametrize("nvcc", ["/cuda/bin/nvcc", None])
def test_the_gpu_run_does_all_that_it_finds_tools_for(nvcc, tmp_path, monkeypatch):
    here = {"device": "a GPU", "capability": "9.0", "triton": True, "pytest": True, "nvcc": nvcc, "sanitizer": "/cs"}
    asked = {}

    def run(self, name, command, limit, **environment):
        asked[name] = (command, environment)
        self.add(gpu.Step(name, "failed" if name == "contract, triton" else "passed", 1.0, ""))
        return True

    monkeypatch.setattr(gpu, "environment", lambda: here)
    monkeypatch.setattr(gpu.Steps, "run", run)
    assert gpu.main(["--out", str(tmp_path)]) == 1  # one has failed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "/c" not in json.dumps(summary)  # no paths of the machine
    statuses = {step["name"]: step["status"] for step in summary["steps"]}
    on_cuda = ["contract, cuda", "compute-sanitizer, memcheck", "compute-sanitizer, racecheck", "benchmarks, cuda"]
    for name in on_cuda:
        assert statuses[name] == ("passed" if nvcc else "not run")
    assert statuses.keys() - set(on_cuda) == {
        "build", "info", "contract, triton", "benchmarks, triton", "benchmarks, torch.compile",
    }  # fmt: skip
    assert asked["build"][1] == {"FMK_CUDA": "1" if nvcc else "0", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert asked["contract, triton"][1] == {"FMK_BACKEND": "triton"}
    run_parser = benchmarks_parser()
    for name in ("benchmarks, triton", "benchmarks, torch.compile"):
        run_parser.parse_args(asked[name][0][4:])  # options that the command knows


def benchmarks_parser():
    """The command's options, on a machine that need not have their device."""
    parser = run.parser(None)
    for action in parser._actions:
        if action.dest == "device":
            action.type = str
    return parser


def test_without_pytest_benchmark_the_same_cases_run(quick, monkeypatch, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert run.main(["--op", "noise", "--size", "4x4", "--dtype", "fp32", "--seconds", "0", "--device", "cpu"]) == 0
    assert "noise" in capsys.readouterr().out


def test_what_the_sanitizer_watches_runs():
    gpu.exercise(str(CPU))
