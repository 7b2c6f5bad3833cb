"""`python -m fmkernels verify`: it holds on what is here, and sees what does not."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from fmkernels import _registration, verification
from fmkernels._verification_cases import OPS, PIECES, Data, Measured, Piece
from fmkernels.verification import Job, Row, check_op, check_piece, main, run, worst_of

# Interpreted kernels take their time by the launch, and the command starts processes with backends of their own.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="verify --interpret is the command")
ROOT = Path(__file__).parent.parent
HERE = _registration.answering("noise", "cpu")


def row(op, dtype="fp32", backend=HERE):
    return Row(op, backend, "cpu", dtype)


@pytest.fixture
def plain_environment(monkeypatch):
    for name in ("FMK_BACKEND", "FMK_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


def test_every_op_is_verified():
    assert OPS.keys() == _registration.references.keys()
    assert not OPS.keys() & PIECES.keys()


@pytest.mark.parametrize("name", OPS)
def test_ops_hold(name):
    for dtype in OPS[name].dtypes:
        found = check_op(row(name, dtype, _registration.answering(name, "cpu")), sizes=4)
        assert not found.problem, found
        assert found.checked and found.error <= found.bound


@pytest.mark.parametrize("name", [name for name in PIECES if name != "compile"])
def test_pieces_hold(name):
    for dtype in PIECES[name].dtypes:
        found = check_piece(row(name, dtype), sizes=3)
        assert not found.problem, found


def test_references_are_bounded_by_themselves(monkeypatch):
    right = _registration.references["guided_euler"]
    assert not check_op(row("guided_euler", backend="reference"), sizes=3).problem
    rough = lambda *arguments: right(*arguments) * (1 + 3e-5)  # noqa: E731
    monkeypatch.setattr(verification, "outputs_of", with_kernel(rough, verification.outputs_of))
    assert check_op(row("guided_euler", backend="reference"), sizes=3).problem


def with_kernel(kernel, outputs_of):
    """``outputs_of`` with another kernel behind the op."""
    return lambda name, call, arguments: outputs_of(
        name, kernel if isinstance(call, torch._ops.OpOverload) else call, arguments
    )


def at_the_end(change):
    """A kernel of runge_kutta_stage whose last element is wrong."""

    def kernel(*arguments):
        y, t = torch.ops.fmkernels.runge_kutta_stage(*arguments)
        y.view(-1)[-1] = change(y.view(-1)[-1])
        return y, t

    return kernel


BROKEN = {
    "a little off": (at_the_end(lambda value: value + 1e-3), "beyond its bound"),
    "not a number": (at_the_end(lambda value: value * torch.nan), "beyond its bound"),
    "infinite": (at_the_end(lambda value: value * torch.inf), "beyond its bound"),
    "another each time": (at_the_end(lambda value: value + 1e-7 * torch.rand(())), "other bits"),
    "another dtype": (lambda *a: [v.double() for v in torch.ops.fmkernels.runge_kutta_stage(*a)], "torch.float64"),
    "another shape": (lambda *a: [v[None] for v in torch.ops.fmkernels.runge_kutta_stage(*a)], "of shape"),
    "one output less": (lambda *a: torch.ops.fmkernels.runge_kutta_stage(*a)[:1], "expected 2 outputs, got 1"),
    "raises": (lambda *a: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_kernel_is_seen(how, monkeypatch):
    kernel, problem = BROKEN[how]
    spoilt = lambda *arguments: (lambda found: tuple(found) if isinstance(found, list) else found)(kernel(*arguments))  # noqa: E731
    monkeypatch.setattr(verification, "outputs_of", with_kernel(spoilt, verification.outputs_of))
    try:
        said = check_op(row("runge_kutta_stage"), sizes=3).problem
    except RuntimeError as error:
        said = str(error)
    assert problem in said


def test_a_wrong_gradient_is_seen(monkeypatch):
    right = verification.gradients_of

    def wrong(op, call, arguments):
        found = right(op, call, arguments)
        return tuple(1.001 * v for v in found) if isinstance(call, torch._ops.OpOverload) else found

    monkeypatch.setattr(verification, "gradients_of", wrong)
    assert "gradient 0" in check_op(row("matching_loss"), sizes=3).worst


def test_numbers_that_must_be_equal_to_the_bit():
    value = torch.tensor([1.0, -2.0])
    almost = value * (1 + 2**-23)
    assert worst_of(almost, value, value.double(), torch.float32).share < 1
    assert worst_of(almost, value, value.double(), torch.float32, exact=True).share == torch.inf
    assert worst_of(torch.tensor([1, 3]), torch.tensor([1, 2]), torch.tensor([1, 2]), torch.float32).where == "2 at [1]"
    nan = torch.tensor([torch.nan, -2.0])
    assert worst_of(nan, nan, nan.double(), torch.float32).share == torch.inf
    assert worst_of(nan, nan, nan.double(), torch.float32, nan=True).share == 0


@pytest.mark.parametrize("error", [2.0, float("nan")])
def test_a_piece_that_does_not_hold_is_seen(error, monkeypatch):
    steps = [Measured("first", 0.5, 1.0), Measured("second", error, 1.0), Measured("third", 0.0, 0.0)]
    monkeypatch.setitem(PIECES, "linear_ode", Piece(lambda data: iter(steps)))
    found = check_piece(row("linear_ode"), sizes=3)
    assert (found.problem, found.worst) == ("beyond its bound", "second")


def test_inputs_depend_on_the_seed_alone():
    first, again = (Data.of("bf16", "cpu", 3).normal(3, 5) for _ in range(2))
    assert torch.equal(first, again)


def falls_over(connection, job):
    """In a process of its own: the first row ends it, the others hold."""
    connection.send("")
    for one in job.rows:
        connection.send(one)
        if one.op == "noise":
            os.kill(os.getpid(), signal.SIGSEGV)
        connection.send(one)


def test_a_crash_fails_its_row_and_the_others_are_checked(monkeypatch):
    monkeypatch.setattr(verification, "serve", falls_over)
    rows = tuple(row(name) for name in ("noise", "probe", "probe_dot"))
    begun = []
    findings = run(Job("cpp", "cpu", rows), begun.append)
    assert [one.op for one in findings.rows] == [one.op for one in begun] == ["noise", "probe", "probe_dot"]
    assert [bool(one.problem) for one in findings.rows] == [True, False, False]
    assert "SIGSEGV" in findings.rows[0].problem


def test_the_command(plain_environment, tmp_path, capsys):
    path = tmp_path / "found.json"
    status = main(["--op", "guided_euler,linear_ode", "--dtype", "fp32", "--device", "cpu", "--json", str(path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    document = json.loads(path.read_text())
    assert document["holds"]
    built = _registration.library_path().exists()
    assert {one["backend"] for one in document["rows"]} == ({"reference", "cpp"} if built else {"reference"})
    assert {one["op"] for one in document["rows"]} == {"guided_euler", "linear_ode"}
    assert any(one["error"] > 0 for one in document["rows"])
    assert f"{len(document['rows'])} of {len(document['rows'])} rows hold" in printed
    assert built or "NOT CHECKED cpp on cpu: compiled library not built" in printed


RIGHT, WRONG = row("noise", backend="reference"), Row("noise", "cpp", "cpu", "fp32", problem="beyond its bound")


@pytest.mark.parametrize(
    ("options", "of_cpp", "status", "said"),
    [
        ([], verification.Findings([], "not built"), 0, "NOT CHECKED cpp on cpu: not built"),
        (["--backend", "reference,cpp"], verification.Findings([], "not built"), 2, "NOT CHECKED cpp"),
        ([], verification.Findings([WRONG]), 1, "1 of 2 rows hold"),
    ],
)
def test_exit_status(options, of_cpp, status, said, plain_environment, monkeypatch, capsys):
    findings = {"reference": verification.Findings([RIGHT]), "cpp": of_cpp}
    monkeypatch.setattr(verification, "run", lambda job, progress: findings[job.backend])
    assert main([*options, "--op", "noise", "--dtype", "fp32", "--device", "cpu"]) == status
    assert said in capsys.readouterr().out


def test_an_interrupt_shows_what_was_found(plain_environment, monkeypatch, tmp_path, capsys):
    def interrupted(futures):
        while not futures[0].done():
            time.sleep(0.01)
        raise KeyboardInterrupt

    def of(job, progress):
        while job.backend != "reference" and not verification.STOP.is_set():
            time.sleep(0.01)
        return verification.Findings([RIGHT] if job.backend == "reference" else [])

    monkeypatch.setattr(verification, "run", of)
    monkeypatch.setattr(verification, "wait", interrupted)
    path = tmp_path / "found.json"
    arguments = ["--op", "noise", "--dtype", "fp32", "--device", "cpu", "--backend", "reference,cpp"]
    assert main([*arguments, "--json", str(path)]) == 130
    said = capsys.readouterr()
    assert "interrupted after 1 of 2 rows" in said.err and "reference on cpu" in said.out
    assert "what came after the interrupt" in json.loads(path.read_text())["not_checked"]


def test_an_interrupt_ends_every_process(plain_environment):
    command = [sys.executable, "-m", "fmkernels", "verify"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    tasks = Path(f"/proc/{process.pid}/task")
    if not tasks.exists():
        process.kill()
        pytest.skip("needs /proc")
    deadline = time.monotonic() + 60
    while sum(len((task / "children").read_text().split()) for task in tasks.iterdir()) < 3:  # two backends, a tracker
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "FAIL" not in printed, printed + errors
    with pytest.raises(
        ProcessLookupError
    ):  # soon: multiprocessing's own process ends when it sees that the others have
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_result_that_cannot_be_written_is_found_first(plain_environment, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verification, "run", lambda job, progress: pytest.fail("checked"))
    with pytest.raises(SystemExit) as stopped:
        main(["--json", str(tmp_path / "nowhere" / "found.json")])
    assert stopped.value.code == 2 and "--json: expected a file that can be written" in capsys.readouterr().err


def test_a_compiler_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    verification.let_inductor_write()
    made = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert made.is_dir() and made.name.startswith("fmkernels-verify-")
    made.rmdir()


class Sent(list):
    send = list.append


@pytest.mark.parametrize("there", [True, False])
def test_a_library_that_does_not_load_fails_and_one_that_is_missing_does_not(there, monkeypatch, tmp_path):
    path = tmp_path / "library.so"
    if there:
        path.touch()
    monkeypatch.setattr(_registration, "library_path", lambda: path)
    monkeypatch.setattr(_registration, "build_facts", dict)
    monkeypatch.setattr(_registration, "answering", lambda name, device: "reference")
    monkeypatch.setattr(_registration, "problems", ["why"])
    sent = Sent()
    with warnings.catch_warnings():
        verification.serve(sent, Job("cpp", "cpu", (row("noise"),)))
    torch.use_deterministic_algorithms(False)
    if there:
        assert sent[0] == "" and [(one.op, one.problem) for one in sent[1:]] == [("compiled library", "why")]
    else:
        assert sent == ["why"]


def test_a_process_starts_with_its_backend_and_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("FMK_BACKEND", "auto")
    before = dict(os.environ)
    job = Job("triton", "cpu", (), interpreted=True)
    with verification.environment(job.environment):
        assert (os.environ["FMK_BACKEND"], os.environ["TRITON_INTERPRET"]) == ("triton", "1")
    assert dict(os.environ) == before


@pytest.mark.parametrize(("variable", "backends"), [("auto", {"reference", "cpp"}), ("reference", {"reference"})])
def test_the_variable_chooses_what_the_option_would(variable, backends, monkeypatch):
    monkeypatch.setenv("FMK_BACKEND", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    todo, missing = verification.jobs(verification.parser(None).parse_args([]))
    assert {job.backend for job in todo} == backends
    assert any("no CUDA device" in text for text in missing)
    todo, _ = verification.jobs(verification.parser(None).parse_args(["--interpret", "--backend", "triton"]))
    assert [(job.backend, job.interpreted, job.sizes) for job in todo] == [("triton", True, 3)]


@pytest.mark.parametrize(
    "options", [["--op", "nois"], ["--dtype", "int8"], ["--backend", "jax"], ["--device", "tpu"], ["--device", "cuda"]]
)
def test_bad_options_name_what_there_is(options, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main(options)
    assert exit.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_dtype_that_an_op_has_not_and_a_backend_that_is_interpreted_alone(plain_environment, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--op", "marginal_field", "--dtype", "bf16"])
    assert "marginal_field has fp32, fp64" in capsys.readouterr().err
    assert main(["--op", "noise", "--backend", "triton"]) == 2
    assert "NOT CHECKED triton on cpu: interpreted alone, with --interpret" in capsys.readouterr().out
