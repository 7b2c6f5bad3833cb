"""The command line: python -m fmkernels info | verify | bench | demo."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fmkernels import __main__ as cli
from fmkernels import _info, _registration, verification


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in ("info", "verify", "bench", "demo"))


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_a_reader_that_goes_away():
    command = f"({sys.executable} -m fmkernels info; echo $? >&2) | (exec 0<&-; sleep 1)"
    for buffered in (True, False):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        environment |= {"PYTHONPATH": str(cli.ROOT)} | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        assert done.stderr == "141\n"


def test_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["inform"])
    assert exit.value.code == 2
    assert "'inform'" in capsys.readouterr().err


def test_info_tells_versions_devices_and_every_backend(capsys, monkeypatch):
    monkeypatch.setattr(_registration, "problems", ["something is missing"])
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, version in _info.versions().items():
        assert any(line.split() == [name, version or "–"] for line in lines)
    for op in _registration.references:
        cells = [_registration.answering(op, device) for device in ("cpu", "cuda")]
        assert any(line.split() == [op, *cells] for line in lines), op
    assert "note: something is missing" in lines
    assert not any("\x1b" in line for line in lines), "colours where nobody reads them"


def test_info_as_a_command_on_references_alone():
    command = [sys.executable, "-m", "fmkernels", "info"]
    environment = {"FMK_BACKEND": "reference", "PYTHONPATH": str(cli.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FMK_BACKEND=reference" in done.stdout
    assert "cpp" not in done.stdout


def test_build_facts_come_from_the_loaded_library():
    facts = _registration.build_facts()
    if _registration.backend() == "reference" or not _registration.library_path().exists():
        assert facts == {}
    else:
        assert {"torch", "compiler", "flags"} <= facts.keys()


@pytest.mark.parametrize(("command", "path"), [("demo", "examples/checkerboard.py"), ("bench", "benchmarks/run.py")])
def test_outside_a_checkout_the_message_says_what_is_missing(command, path, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=f"{path} is not here.*checkout"):
        cli.main([command])


def test_demo_passes_its_arguments_on(monkeypatch, tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/checkerboard.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.main(["demo", "--steps", "3"]) == 2


def test_verify_needs_no_checkout_and_gives_its_status_back(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(verification, "run", lambda job, progress: verification.Findings(list(job.rows)))
    assert cli.main(["verify", "--op", "noise"]) == 0
    monkeypatch.setattr(
        verification, "run", lambda job, progress: verification.Findings([replace(job.rows[0], problem="wrong")])
    )
    assert cli.main(["verify", "--op", "noise"]) == 1


def test_table_is_aligned(capsys):
    _info.print_table("Title", ("op", "time"), [("a", "1"), ("longer", "10")])
    assert capsys.readouterr().out.splitlines() == [
        "Title", "  op      time", "  ------  ----", "  a          1", "  longer    10", "",
    ]  # fmt: skip
