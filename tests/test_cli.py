"""The command line: quick help, near misses, one-line errors, exit codes."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medgen import cli
from medgen.config import ConfigError


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = "import sys; from medgen.cli import main; main(['--help']); print(sorted({'torch', 'tyro', 'diffusers'} & set(sys.modules)))"
    wall, cpu = [], []
    for _ in range(3):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        cpu.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(cpu) < 0.5, f"{min(cpu):.2f} s of processor time, {min(wall):.2f} s by the clock"
    for verb in ("doctor", "demo", "digital", "data", "train", "sample", "evaluate", "bench"):
        assert f"  {verb}" in done.stdout


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_help_and_a_summary(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: medgen {name}" in said
    assert len(said.splitlines()) > 6


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["docter"], "medgen doctor"),
        (["trian", "text-to-cxr"], "medgen train text-to-cxr"),
        (["train", "text-cxr", "--config", "x"], "medgen train text-to-cxr"),
        (["smaple", "--help"], "medgen sample"),
        (["evaluate", "text2cxr"], "medgen evaluate text-to-cxr"),
        (["xyzzy"], "medgen --help"),
    ],
)
def test_an_unknown_verb_names_the_nearest(words: list[str], nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert nearest in said
    assert len(said.splitlines()) == 1


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "text-to-cxr", "--confg", "x.yaml"])
    assert stop.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_our_errors_are_one_line_and_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "classifier", "--config", str(tmp_path / "none.yaml"), "train.steps=3"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no configuration file at")
    assert "Traceback" not in said
    assert cli.main([*words, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [(ConfigError("wrong"), 1, True), (KeyboardInterrupt(), 130, False), (ZeroDivisionError("x"), 1, True)],
    ids=["raised outside medgen", "Ctrl-C", "a bug"],
)
def test_what_is_not_ours_keeps_its_traceback(
    error: BaseException, code: int, traceback: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb() -> None:
        """Fail."""
        raise error

    monkeypatch.setitem(cli.VERBS, "doctor", cli.Verb("fail", verb))
    assert cli.main(["doctor"]) == code
    assert ("Traceback" in capsys.readouterr().err) == traceback


def test_the_installed_command_is_this_one() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("medgen")), "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("medgen ")
