"""The benchmarks: they verify before they time, count what they say, and refuse figures that cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fmkernels as fmk  # noqa: E402
from benchmarks import (  # noqa: E402
    compare,
    conditional_flow,
    gpu,
    head,
    likelihood,
    machine,
    marginal,
    measure,
    peers,
    plot,
    probes,
    run,
    sampling,
)

CPU = torch.device("cpu")
OPS = head.OPS | sampling.OPS | probes.OPS | conditional_flow.OPS


def tiny(op="head", rows=16, columns=8, dtype=torch.float32):
    return OPS[op](rows, columns, dtype, CPU)


@pytest.fixture
def quick(monkeypatch):
    """A few short rounds; and the memory is taken for as fast as it likes, as so little of it is measured."""
    monkeypatch.setattr(measure, "LAP", 1e-5)
    monkeypatch.setattr(measure, "ROUNDS", (3, 3))
    monkeypatch.setattr(measure, "SETS", 2)
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1000})
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
    assert results["machine"].keys() >= {"copy_jitter", "copy_drift", "loop_jitter", "warnings"}
    assert row["pause_s"] > 0 and row["copy_s"] > 0
    plot.speed_up(results, tmp_path / "bars.png")
    for picture in (plot.roofline, plot.speed_ups):
        assert picture(results, tmp_path / f"{picture.__name__}.png")
        assert not picture({"device": "a device", "results": [{"op": "head", "error": "wrong"}]}, tmp_path / "none.png")
    assert all(picture.stat().st_size > 5000 for picture in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 3


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


@pytest.mark.parametrize("op", conditional_flow.OPS)
def test_verification_of_a_conditional_flow_sees_a_wrong_velocity(op, monkeypatch):
    case = tiny(op)
    case.verify(case.tensors())
    x_t, u_t = case.ours(b := case.tensors())
    monkeypatch.setattr(case, "ours", lambda b: (x_t, u_t * 1.001))
    with pytest.raises(AssertionError):
        case.verify(b)


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
        "build", "info", "verify", "contract, triton", "benchmarks, triton", "benchmarks, torch.compile",
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


def test_several_results_make_pictures_through_the_command(tmp_path, capsys):
    figures = {"bytes": 10**6, "gb_per_s": 9.0, "copy_gb_per_s": 11.0, "peers": {"eager": {"ratio": 2.0}}}
    rows = [
        {"op": op, "size": size, "dtype": dtype, **figures}
        for op in ("head", "noise", "sample_path", "matching_loss", "probe_dot", "runge_kutta_step")
        for size, dtype in (("256x2", "float32"), ("32x196608", "bfloat16"))
    ]
    (tmp_path / "results.json").write_text(json.dumps({"device": "a device", "results": rows}))
    assert run.main(["--from", str(tmp_path / "results.json"), "--plot", str(tmp_path / "deep")]) == 0
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["roofline.png", "speedup.png"]
    assert "written" in capsys.readouterr().out


def measured(median, spread=0.1, copy=1.0, ratio=4.0, op="noise", **more):
    figures = {"median_s": median, "iqr_s": spread * median, "copy_s": copy, "peers": {"eager": {"ratio": ratio}}}
    return {"op": op, "size": "4x4", "dtype": "float32", **figures, **more}


def written(path, *rows, **more):
    path.write_text(json.dumps({"device": "a device", "results": list(rows), **more}))
    return str(path)


@pytest.mark.parametrize(
    ("new", "ratio", "verdict", "status"),
    [
        (measured(2.0), "2.00", "slower", 1),
        (measured(2.0, copy=2.0), "1.00", "", 0),  # all of the machine is slower
        (measured(1.0, copy=0.5), "2.00", "slower", 1),  # all of the machine is faster, but not this
        (measured(1.25), "1.25", "slower", 0),  # beyond the spread, but not by 30 %
        (measured(1.35, spread=0.3), "1.35", "", 0),  # within the spread
        (measured(0.5), "0.50", "faster", 0),
    ],
)
def test_comparing_two_runs(new, ratio, verdict, status, tmp_path, capsys):
    files = (
        written(tmp_path / "old", measured(1.0)),
        written(tmp_path / "new", {**new, "peers": {"eager": {"ratio": 5}}}),
    )
    assert run.main(["--compare", *files, "--fail-on-regression", "30"]) == status
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  noise")]
    assert line[:3] == ["noise", "4x4", "fp32"] and ratio in line
    assert (line[3] == verdict) == bool(verdict)
    assert line[-3:] == ["4.00x", "→", "5.00x"]
    assert run.main(["--compare", *files]) == 0


def test_times_are_relative_to_what_both_runs_have():
    old, new = measured(1.0, copy_gb_per_s=10.0, pause_s=3.0), measured(2.0, copy_gb_per_s=5.0, pause_s=6.0)
    for field, name in (("copy_s", "its copy"), ("copy_gb_per_s", "its best copy"), ("pause_s", "a copy after it")):
        change = compare.change(("noise", "4x4", "float32"), old, new)
        assert (change.measure, change.ratio) == (name, 2.0 if field == "copy_s" else 1.0)
        del old[field]
    assert compare.change(("noise", "4x4", "float32"), old, new).ratio == 2.0


def test_what_is_in_one_file_alone_or_failed_is_said(tmp_path, capsys):
    old = written(
        tmp_path / "old", measured(1.0), measured(1.0, op="probe"), measured(1.0, op="head"), versions={"torch": "1"}
    )
    failed = {"op": "probe", "size": "4x4", "dtype": "float32", "error": "wrong"}
    new = written(tmp_path / "new", measured(1.0), failed, machine={"warnings": ["busy"]}, versions={"torch": "2"})
    assert run.main(["--compare", old, new]) == 0
    printed = capsys.readouterr().out
    assert "only in the old file, or failed: probe-4x4-float32, head-4x4-float32" in printed
    assert "note: torch 1 → 2" in printed and "note: the new run was noisy: busy" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("no JSON", "expected JSON that bench --json wrote"),
        ("[]", 'with "device" and "results"'),
        (json.dumps({"device": "a device", "results": [], "schema": 99}), "expected schema 1, got 99"),
        (
            json.dumps({"device": "another", "results": []}),
            "expected results of one device, got 'another' and 'a device'",
        ),
        (json.dumps({"device": "a device", "results": []}), "no case in common"),
    ],
)
def test_files_that_cannot_be_compared(text, message, tmp_path):
    if text is not None:
        (tmp_path / "old").write_text(text)
    with pytest.raises(SystemExit, match=message):
        run.main(["--compare", str(tmp_path / "old"), written(tmp_path / "new", measured(1.0))])


def test_a_regression_needs_something_to_compare_with(capsys):
    with pytest.raises(SystemExit):
        run.main(["--fail-on-regression", "5"])
    assert "--compare" in capsys.readouterr().err


def test_committed_results_can_be_compared():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert compare.compare(path, path, 0.0) == 0


def test_a_noisy_machine_is_said(quick, monkeypatch, capsys):
    watch = machine.Machine(CPU)
    watch.laps = {"copy": [[1.0] * 7] * 3, "loop": [[1.0] * 7] * 3}
    watch.started, watch.ticks, watch.own = 0.0, None, 0.0
    assert watch.report()["warnings"] == []
    watch.laps["copy"] = [[1.0] * 7, [1.0] * 7, [1.4] * 7]
    watch.laps["loop"] = [[1.0] * 5 + [1.2, 1.3]] * 3
    assert watch.report()["warnings"] == ["the copy drifts by 40% during the run", "laps of one loop differ by 20%"]
    watch.laps = {"copy": [[1.0] * 7], "loop": [[1.0] * 7]}
    watch.ticks = (0, 0, 0)
    monkeypatch.setattr(machine, "processor_ticks", lambda: (1000, 500, 30))
    monkeypatch.setattr(watch, "own_seconds", lambda: 300 / machine.os.sysconf("SC_CLK_TCK"))
    assert watch.report()["warnings"] == [
        "other programs use 20% of the processors", "the host withholds 3% of the processors",
    ]  # fmt: skip
    monkeypatch.setattr(machine.Machine, "warnings", lambda self, found: ["it shakes"])
    assert run.main(["--op", "noise", "--size", "4x4", "--dtype", "fp32", "--seconds", "0", "--device", "cpu"]) == 0
    assert "warning: the machine is noisy: it shakes" in capsys.readouterr().out


def test_clocks_that_are_held_down_are_named(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.torch.cuda, "current_device", lambda: 1)
    said = subprocess.CompletedProcess([], 0, "0x0000000000000001\n0x0000000000000044\n", "")
    monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: said)
    assert machine.held_down() == ["power cap", "temperature (hardware)"]
    said.stdout = "Field is not valid"
    assert machine.held_down() == []


def test_quick_is_a_small_case_of_each_op_without_the_compiler():
    def session(*options):
        return run.Session(run.parser(None).parse_args(["--device", "cpu", *options]))

    quick = session("--quick")
    assert [case.op for case in quick.cases] == [op for op in run.OPS if op not in run.UNHURRIED]
    assert all(case.dtype == torch.float32 for case in quick.cases)
    assert {case.size for case in quick.cases if case.op.startswith("head")} == {"256x784"}
    assert "torch.compile" not in quick.peers and quick.seconds == 0.5
    assert run.guess(quick) < 300 < run.guess(session())
    assert [case.op for case in session("--quick", "--op", "log_prob").cases] == ["log_prob"]
    assert len(session("--quick", "--op", "noise", "--size", "2x2,4x4").cases) == 4


def test_progress_says_how_long_it_will_take(quick, capsys):
    options = ["--op", "noise", "--size", "4x4,8x8", "--dtype", "fp32", "--seconds", "0", "--device", "cpu"]
    assert run.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 to measure, some" in lines[0]
    assert [line.split("]")[0] for line in lines[1:3]][1] == "  [2/2, 0 s left"
    assert run.clock(99) == "99 s" and run.clock(600) == "10 min"


def test_no_speed_for_an_op_that_fails_in_the_command(quick, monkeypatch, capsys):
    monkeypatch.setattr(head.Scale, "ours", lambda self, b: b.gradient.mul_(-1.001))
    assert run.main(["--op", "scale_gradient", "--size", "4x4", "--dtype", "fp32", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED scale_gradient 4x4 float32: AssertionError" in printed and "GB/s" not in printed


SMALL = ["--op", "noise", "--size", "4x4,8x8", "--dtype", "fp32", "--device", "cpu", "--seconds", "0"]


@pytest.mark.parametrize("plain", [False, True])
def test_a_case_that_raises_is_a_failure_of_its_own(plain, quick, monkeypatch, tmp_path, capsys):
    """A broken peer, say: the other cases are measured, shown and written all the same."""
    if plain:
        monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)

    def broken(self):
        if self.rows == 4:
            raise RuntimeError("this peer is broken")
        return {}

    monkeypatch.setattr(head.Noise, "peers", broken)
    path = tmp_path / "results.json"
    assert run.main([*SMALL, "--json", str(path)]) == 1
    said = capsys.readouterr()
    assert "FAILED noise 4x4 float32: RuntimeError: this peer is broken" in said.out and "Traceback" in said.err
    assert "  noise  8x8   fp32" in said.out
    assert ["error" in row for row in json.loads(path.read_text())["results"]] == [True, False]


@pytest.mark.parametrize("plain", [False, True])
def test_an_interrupt_keeps_what_is_measured(plain, quick, monkeypatch, tmp_path, capsys):
    if plain:
        monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    verify = head.Noise.verify

    def interrupted(self, b):
        if self.rows == 8:
            raise KeyboardInterrupt
        verify(self, b)

    monkeypatch.setattr(head.Noise, "verify", interrupted)
    path = tmp_path / "results.json"
    assert run.main([*SMALL, "--json", str(path)]) == 130
    said = capsys.readouterr()
    assert "interrupted after 1 of 2 cases" in said.err
    assert f"written: {path}" in said.out and "  noise  4x4   fp32" in said.out
    assert [row["size"] for row in json.loads(path.read_text())["results"]] == ["4x4"]


def test_what_cannot_be_written_is_found_before_anything_is_measured(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "run", lambda session: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for option, value in (("--json", tmp_path), ("--json", tmp_path / "file" / "x"), ("--plot", tmp_path / "file")):
        with pytest.raises(SystemExit) as stopped:
            run.main([*SMALL, option, str(value)])
        assert stopped.value.code == 2
        assert f"{option}: expected a f" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run.main([*SMALL, "--plot", str(tmp_path / "plots")])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_disk_that_is_full_is_said(quick, monkeypatch, tmp_path, capsys):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "results.json").symlink_to(full)
    assert run.main([*SMALL, "--json", str(tmp_path / "results.json")]) == 2
    said = capsys.readouterr()
    assert "could not be written: [Errno 28]" in said.err and "written:" not in said.out and "8x8" in said.out


def test_the_committed_file_of_a_device_is_not_cut_short(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "slug", lambda device: "here")
    path = tmp_path / "results" / "here.json"
    path.parent.mkdir()
    rows = [{"op": "noise", "size": size, "dtype": "float32"} for size in ("4x4", "9x9")]
    path.write_text(json.dumps({"device": "a device", "results": rows}))
    with pytest.raises(SystemExit):
        run.main([*SMALL, "--json"])
    assert "has 1 cases that this run does not measure and would drop; name a file" in capsys.readouterr().err
    assert json.loads(path.read_text())["results"] == rows


@pytest.mark.parametrize(
    "options",
    [
        ["--threads", "0"],
        ["--seconds", "nan"],
        ["--seconds", "-1"],
        ["--peers", "eager,none"],
        ["--compare", "a", "b", "--op", "noise"],
        ["--from", "a", "--quick"],
        ["--compare", "a", "b", "--fail-on-regression", "-5"],
    ],
)
def test_bad_options_of_the_command(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(options)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "expected" in said


def test_a_peer_that_no_case_has_is_named(quick, capsys):
    assert run.main([*SMALL, "--peers", "torchdiffeq"]) == 0
    assert "note: no case was measured beside torchdiffeq" in capsys.readouterr().out


def test_checks_hold_without_assertions(tmp_path):
    """python -O leaves out what is written as an assert, but no check of the benchmark's."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import fmkernels as fmk
from benchmarks import run
right = fmk.ops.probe
fmk.ops.probe = lambda *a, **k: -right(*a, **k)
sys.exit(run.main(["--op", "probe", "--size", "4x8", "--dtype", "fp32", "--peers", "none", "--seconds", "0"]))
"""
    done = subprocess.run([sys.executable, "-O", "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "FAILED probe 4x8" in done.stdout, done.stdout + done.stderr


def test_peers_that_are_not_installed_are_left_out(quick, monkeypatch):
    missing = {"torchcfm", "flow_matching", "torchdiffeq", "torchode"}
    for name in [name for name in sys.modules if name.split(".")[0] in missing] + sorted(missing):
        monkeypatch.setitem(sys.modules, name, None)
    cases = run.Session(run.parser(None).parse_args(["--device", "cpu", "--quick", "--op", ",".join(run.OPS)])).cases
    assert {case.op for case in cases} == set(run.OPS)
    assert not any(measure.family(name) in missing for case in cases for name in case.peers())
