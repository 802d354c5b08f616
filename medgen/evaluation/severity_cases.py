"""Severity cases of digital patients: one body and one pose, a finding slight or large, and the ROI that it could ever fill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation

from medgen.data.records import FINDINGS
from medgen.digital.chest import Film, draw_study, render
from medgen.digital.patient import SIDED, Finding, Study
from medgen.digital.reports import write_report
from medgen.sampling.recaptioner import WORDS
from medgen.seeds import stable_seed

SLIGHT, LARGE = 0.2, 0.85
MARGIN = 3  # pixels at 128 that a reader's outline goes beyond the finding


def write_severity_cases(
    out: Path,
    patients: int = 20,
    seed: int = 90_500,
    findings: Sequence[str] = ("pleural_effusion",),
    size: int = 128,
) -> Path:
    """Write films, ROIs and `cases.jsonl` for `medgen sample severity`: of every patient a progression and a resolution.

    The ROI is where the finding would be at its largest. The truth (mL or the like of the source) goes along in the case lines.

    Args:
        out: folder to write into.
        patients: how many digital patients; two cases of each.
        seed: of their population; choose one that no model was trained on.
        findings: what is edited, in turn.
        size: width and height in pixels.
    """
    if unknown := sorted(set(findings) - set(FINDINGS)) or (patients < 1 and ["patients < 1"]):
        raise ValueError(f"expected at least one patient, and findings among {', '.join(FINDINGS)}; got {', '.join(unknown)}")
    (out / "films").mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for index in range(patients):
        lines += _of_patient(out, seed, index, findings[index % len(findings)], size)
    path = out / "cases.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _of_patient(out: Path, seed: int, index: int, name: str, size: int) -> list[dict[str, Any]]:
    study = draw_study(seed, index, ("PA",))
    rng = np.random.default_rng(stable_seed("severity case", seed, index))
    side = str(rng.choice(["left", "right"])) if name in SIDED else None
    lobe = "lower" if name in ("consolidation", "nodule", "atelectasis") else None
    # Every third patient has something else too, which the edit must leave alone.
    others = tuple(f for f in study.findings if f.name in ("cardiomegaly", "edema", "hyperinflation") and f.name != name)[:1]
    others = others if index % 3 == 0 else ()

    def film(severity: float) -> tuple[Film, Study]:
        mm = 60 * severity if name == "nodule" else None
        found = Finding(name, severity, side, lobe, mm, seed=stable_seed(seed, index, name) % 2**31)
        changed = replace(study, findings=(*others, found))
        return render(changed, size)[0], changed

    bit = FINDINGS.index(name)
    widest = (film(1.0)[0].mask >> bit & 1) > 0
    region = binary_dilation(widest, iterations=max(1, round(MARGIN * size / 128)))
    patient, worst = study.patient.patient_id, WORDS[cast(Any, name)][3]
    roi = f"films/{patient}_roi.png"
    Image.fromarray(region.astype(np.uint8) * 255).save(out / roi)
    plain = " ".join(filter(None, (side, name.replace("_", " ").replace("edema", "pulmonary edema"))))
    lines = []
    for purpose, severity, target in (
        ("progression", SLIGHT, f"60 mm {plain}" if name == "nodule" else f"{worst} {plain}"),
        ("resolution", LARGE, f"no {plain}"),
    ):
        shot, shown = film(severity)
        image = f"films/{patient}_{purpose}.png"
        Image.fromarray((shot.image * 255).round().astype(np.uint8)).save(out / image)
        lines.append(
            {
                "case_id": f"{patient}-{purpose}",
                "seed": index,
                "n": 1,
                "image": image,
                "roi": roi,
                "report": write_report(shown)[0],
                "target": target,
                "patient_id": patient,
                "purpose": purpose,
                "truth": shot.truth,
            }
        )
    return lines
