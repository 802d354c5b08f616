"""The demo from end to end, with fewer films: what it promises is on the page, and a second run has nothing left to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medgen.demo.run import PROMPTS, demo
from medgen.demo.session import QUICK


@pytest.mark.timeout(900)
def test_the_demo_leaves_a_page_and_a_second_run_has_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo(tmp_path, quick=True)
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text("utf-8")
    assert text.count("<figure>") == len(PROMPTS)
    assert text.count("<video") == text.count('class="volume"') == QUICK.clips, "films from ECGs, each with its measured curve"
    assert "identical, bit for bit" in text, "the run that was killed and resumed equals the one left alone"
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["laterality"] is not None
    films = {path: path.stat().st_mtime_ns for folder in ("prompts", "generated") for path in (tmp_path / folder).glob("*.png")}
    assert len(films) > len(PROMPTS)

    demo(tmp_path, quick=True)
    assert {path: path.stat().st_mtime_ns for path in films} == films
