"""The demo's evaluation: balanced held-out prompts and pairs, sampled and measured as any model would be, and read aloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medgen.demo.page import bar_chart
from medgen.demo.session import Session, read_lines, words
from medgen.evaluation.cases import write_alignment_cases
from medgen.evaluation.text_to_cxr import evaluate
from medgen.sampling.text_to_cxr import sample


def measure(session: Session, manifest: Path) -> tuple[dict[str, Any], int]:
    """Sample the evaluation's prompts from the shipped pipeline and measure them against digital patients it never saw.

    Returns the page's part about it and the number of films drawn.
    """
    sizes = session.sizes
    with session.step("films from unseen reports", "generated") as generated:
        cases = session.out / "cases.jsonl"
        if not cases.exists():
            write_alignment_cases(manifest, cases, n=sizes.measured, pairs=sizes.pairs, repeats=2, least=sizes.least, split=None)
        sample(session.name, generated, cases=str(cases), steps=sizes.sampling_steps)
    with session.step("measured against real digital patients", "evaluation") as folder:
        evaluate(generated, manifest, folder, split="all")
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    return describe(metrics), len(read_lines(generated / "metadata.jsonl"))


def describe(metrics: dict[str, Any]) -> dict[str, Any]:
    """The page's words, table and chart about `metrics`."""
    facts, findings = metrics["facts"], metrics["findings"]
    rows = [
        _row("finding AUROC, mean", findings["macro"], "does the classifier see what was asked for? 1: always, 0.5: a coin"),
        _row("finding AUROC, worst", findings["worst"]["auroc"], f"the same for {words(findings['worst']['name'])}"),
    ]
    for kind, meaning in (
        ("laterality", "“left” became “right”, same noise: the finding changed sides"),
        ("negation", "a finding became “No …”, same noise: it went away"),
    ):
        if metrics[kind]:
            rows.append(_row(f"{kind} pairs", metrics[kind]["accuracy"], meaning, percent=True))
    frechet = metrics["fidelity"]["metrics"]["frechet"]
    if frechet["ratio"]:
        rows.append(
            _row("Fréchet distance ÷ floor", frechet["ratio"], "1: as close to digital patients as other digital patients are")
        )
    if metrics["diversity"]:
        real = metrics["diversity"]["real"]["value"]
        rows.append(
            _row("MS-SSIM within a prompt", metrics["diversity"]["generated"], f"1: always the same film; real pairs {real:.2f}")
        )
    shown = [(words(o["name"]), o["auroc"]["value"]) for o in findings["outputs"] if o["auroc"] and _is_finding(o["name"])]
    return {
        "words": f"{facts['images']} films were drawn from reports of digital patients that neither the model nor its judge ever saw, "
        f"and set beside {facts['reference_images']} films of those patients.",
        "rows": rows,
        "chart_title": "Does the classifier see what the prompt asked for? (AUROC)",
        "chart": bar_chart(shown, target=None, start=0.5),
        "caution": f"{facts['images']} films are few: the ranges in brackets say how few. The model card holds the figures of a full "
        "evaluation. The judge is a classifier of ours, trained on digital patients; it is no radiologist, and none of this says "
        "anything about real patients.",
    }


def _is_finding(name: str) -> bool:
    return not name.endswith(("_left", "_right"))


def _row(name: str, estimate: dict[str, Any] | None, meaning: str, percent: bool = False) -> dict[str, str]:
    if not estimate or estimate["value"] is None:
        return {"name": name, "value": "–", "meaning": meaning}
    scale, digits, unit = (100, 0, " %") if percent else (1, 2, "")
    shown = f"{scale * estimate['value']:.{digits}f}{unit}"
    if estimate["low"] is not None:
        shown += f" ({scale * estimate['low']:.{digits}f}–{scale * estimate['high']:.{digits}f})"
    return {"name": name, "value": shown, "meaning": meaning}
