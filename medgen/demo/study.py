"""The demo's last part, from films to a verdict: a blinded pack of its own films, read by simulated readers, analysed with the key."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from medgen.demo.session import Session

_PROTOCOL = """\
study_id: demo
title: Films of the demo, real or synthetic
seed: 7
hypotheses: None. This shows how a study runs; its readers are simulated.
margin: 0.1
readers: 5
arms:
  - {{name: model, source: synthetic}}
  - {{name: patients, source: real, splits: [train, val, test]}}   # "real" is a digital patient here
sections:
  - {{name: origin, task: real_or_synthetic, cases: {cases}, repeats: 0.2, training: 1}}
  - {{name: realism, task: likert_realism, cases: {few}}}
  - {{name: text, task: text_alignment, cases: {few}}}
"""


def read_blinded(session: Session, manifest: Path) -> dict[str, Any]:
    """Build the pack of the films that were measured and as many digital patients', rehearse its reading; the page's part about it."""
    from medgen.study.analyze import analyze
    from medgen.study.build import build
    from medgen.study.simulated import simulate

    with session.step("a blinded reading, rehearsed by simulated readers", "study") as folder:
        pack, answers, report = folder / "pack", folder / "answers", folder / "report"
        key, cases = folder / "pack.key.json", session.sizes.read
        if not (report / "metrics.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            protocol = folder / "protocol.yaml"
            protocol.write_text(_PROTOCOL.format(cases=cases, few=cases // 2))
            with redirect_stdout(io.StringIO()):  # the next commands that each of them would name
                if not pack.exists():
                    build(protocol, pack, session.out / "generated", manifest)
                simulate(pack, key, answers)
                analyze(pack, tuple(sorted(answers.glob("*.csv"))), key, report)
    metrics = json.loads((report / "metrics.json").read_text("utf-8"))
    return {
        "items": len(json.loads(key.read_text("utf-8"))["items"]),
        "readers": metrics["facts"]["readers"],
        "answers": metrics["facts"]["answers"],
        "pack": f"{folder.name}/pack/index.html",
        "report": f"{folder.name}/report/report.html",
    }
