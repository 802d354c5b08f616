"""`medgen augment plan`: from what real films show to the prompts of the synthetic films that shall be added (clips: `clip_plan`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medgen import __version__
from medgen.augmentation.balancing import Floats, balancing_weights, draw
from medgen.augmentation.captions import FRONTAL, Caption, CaptionSource, kind_of, present_sides, real_captions, written_captions
from medgen.augmentation.clip_plan import plan_clips
from medgen.augmentation.plan_plot import draw_plan
from medgen.augmentation.planned import PlanError, Planned, origin, refuse_shared_patients, write_plan
from medgen.augmentation.target import Aim, Counts, Target, aims, count, count_records, finding_shares, load_target
from medgen.data.echo_records import EchoRecord
from medgen.data.records import FINDINGS, CXRRecord, FindingLabel, Manifest, Split, manifest_kind, read_manifest
from medgen.sampling.cases import Case, TextConditions, write_cases
from medgen.seeds import stable_seed

MISSED = 0.02  # a share further than this from its target is named
REAL_WORDS = (
    "The prompts are reports of real patients, word for word: treat this plan, the prompts and the synthetic records like those "
    "reports."
)
UNSEEN_PERSON = (
    "The prompts say nothing of sex and age, so the generator does not know them: groups are balanced in which findings go together "
    "and how they are worded, not in how the patient looks. Records of the films leave sex and age open."
)


def plan(
    manifest: Path,
    out: Path,
    target: str = "balance",
    n: int = 1000,
    split: Split = "train",
    captions: Literal["auto", "reports", "written"] = "auto",
    heldout: Path | None = None,
    seed: int = 0,
) -> Planned:
    """Plan synthetic films or echo clips for a manifest: writes cases.jsonl (for `medgen augment generate`), plan.json and plan.png.

    Any part of the cases is a random part of the plan, so the first half of them is balanced too.

    Args:
        manifest: the real films that a classifier will learn from, or echo clips: then every ten points of ejection fraction are
            balanced, by way of the patients whose ECGs are asked about.
        out: folder to write into.
        target: balance (every finding, side and group equally often), fill (balanced together with the real films), real (as in the
            real films), or a YAML file such as configs/augmentation/balance.yaml.
        n: synthetic films or clips.
        split: which split of the manifest; no other one is looked at.
        captions: of films: reports (those of the split, word for word), written (new ones, by the digital patients' own writer);
            auto: written for digital patients, else reports.
        heldout: manifest of the films that the classifier will be tested on: none of its patients may be in the split.
        seed: of the choice of reports and of the noise.

    Raises `PlanError` or `ManifestError` (both `ValueError`).
    """
    if n < 1:
        raise PlanError(f"n must be at least 1, not {n}")
    if manifest_kind(manifest) == EchoRecord.kind:
        return plan_clips(manifest, out, target, n, split, heldout, seed)
    asked, data = load_target(target), read_manifest(manifest, split)
    records = [record for record in data.records if record.view in FRONTAL]
    if heldout is not None:
        refuse_shared_patients(data, read_manifest(heldout))
    real = count_records(records)
    _check_classes(records, data.name)
    source: CaptionSource = _source(data) if captions == "auto" else captions
    pool = real_captions(records) if source == "reports" else written_captions(max(2 * n, 400), seed)
    shares, notes = finding_shares(asked, real, n)
    _check_possible(pool, shares, data.name, source)
    wanted = aims(pool, shares, asked, real)
    weights = _weights(pool, wanted, asked, n)
    chosen = _draw(pool, weights, n, seed)
    cases = _cases(chosen, asked, real, seed)
    notes += _missed(wanted, weights)
    notes += [REAL_WORDS] * (source == "reports") + [UNSEEN_PERSON] * (asked.groups == "equal" and not asked.person)
    planned = count([(c.labels, c.sex, c.age, case.extra["view"]) for c, case in zip(chosen, cases, strict=True)])
    facts = {
        "medgen": __version__,
        "manifest": origin(data, manifest, out, split),
        "patients": len({record.patient_id for record in records}),
        "seed": seed,
        "captions": source,
        "reports_to_choose_from": len(pool),
        "most_prompts_of_one_report": max(Counter(caption.source for caption in chosen).values()),
        "target": asked.model_dump(mode="json"),
        "finding_shares": shares,
        "real": dataclasses.asdict(real),
        "planned": dataclasses.asdict(planned),
        "notes": notes,
    }
    write_plan(out, write_cases(cases), facts, draw_plan(real, planned, shares))
    return Planned(out, n, tuple(notes))


def stratum(labels: Sequence[FindingLabel], rarest: Sequence[str]) -> str:
    """What a film is filed under: its rarest finding, with its side; "normal" or "in doubt" without one."""
    present = present_sides(labels)
    name = next((name for name in rarest if name in present), None)
    if name is None:
        return kind_of(labels)
    return f"{name}, {present[name]}" if present[name] else name


def rarest_first(real: Counts) -> list[str]:
    """FINDINGS by how many real films show them."""
    return sorted(FINDINGS, key=lambda name: real.findings.get(name, 0))


def _source(data: Manifest[CXRRecord]) -> CaptionSource:
    return "written" if data.source.startswith("medgen digital chest") else "reports"


def _check_classes(records: Sequence[CXRRecord], name: str) -> None:
    states = [frozenset(x.name for x in record.labels if x.state == "present") for record in records]
    if not states:
        raise PlanError(f"manifest {name!r} has no frontal film (views {', '.join(FRONTAL)})")
    if len(set(states)) == 1:
        only = " and ".join(sorted(states[0])) or "no finding"
        raise PlanError(
            f"one class only: all {len(states)} films of {name!r} show {only}; a classifier needs films without it too"
        )


def _check_possible(pool: Sequence[Caption], shares: dict[str, float], name: str, source: CaptionSource) -> None:
    if not pool:
        raise PlanError(f"none of the reports of {name!r} makes a prompt (no words about the image)")
    empty = [finding for finding in FINDINGS if shares[finding] > 0 and not any(finding in c.present for c in pool)]
    if empty and source == "reports":
        raise PlanError(
            f"no report of {name!r} states {', '.join(empty)}: nothing to take a prompt from; set prevalence: "
            f"{{{', '.join(f'{finding}: 0' for finding in empty)}}} in a target file, or --captions written for digital patients"
        )
    if empty:
        raise PlanError(f"none of {len(pool)} written reports states {', '.join(empty)}; raise n")


def _weights(pool: Sequence[Caption], wanted: Sequence[Aim], target: Target, n: int) -> Floats:
    """What part of the films each caption shall prompt."""
    if len(pool) * target.most_repeats < n:
        raise PlanError(
            f"{n} films from {len(pool)} reports would repeat each {n / len(pool):.1f} times, more than most_repeats "
            f"({target.most_repeats}); plan fewer, or raise it in the target file"
        )
    features: Floats = np.stack([aim.values for aim in wanted], axis=1)
    return balancing_weights(features, np.array([aim.share for aim in wanted]), target.most_repeats / n)


def _draw(pool: Sequence[Caption], weights: Floats, n: int, seed: int) -> list[Caption]:
    """`n` captions by weight, in random order; of every combination of findings as many as its weight says."""
    rng = np.random.default_rng(stable_seed("augmentation plan", seed))
    keys = [(str(sorted(c.present.items())), c.sex or "", c.age or 0.0) for c in pool]
    order = np.array(sorted(range(len(pool)), key=keys.__getitem__), dtype=np.intp)
    return [pool[i] for i in rng.permutation(draw(weights, n, order, rng))]


def _cases(chosen: Sequence[Caption], target: Target, real: Counts, seed: int) -> list[Case[TextConditions]]:
    """One case for each film; its labels are what the prompt says."""
    shares: dict[str, float] = {str(view): share for view, share in target.views.items()}
    shares = shares or {view: float(films) for view, films in real.views.items() if view != "UNKNOWN"} or {"PA": 1.0}
    rng = np.random.default_rng(stable_seed("augmentation views", seed))
    names = list(shares)
    ends = np.cumsum([shares[name] for name in names])
    views = rng.permutation(np.searchsorted(ends / ends[-1], (np.arange(len(chosen)) + rng.random()) / len(chosen), side="right"))
    rarest = rarest_first(real)
    width, cases = len(str(len(chosen) - 1)), []
    for number, (caption, view) in enumerate(zip(chosen, views, strict=True)):
        case_id = f"plan-{number:0{width}d}"
        said = caption.sex is not None and caption.age is not None
        extra: dict[str, Any] = {
            "stratum": stratum(caption.labels, rarest),
            "labels": [dataclasses.asdict(label) for label in caption.labels],
            "findings": caption.findings,
            "impression": caption.impression,
            "sex": caption.sex,
            "age": caption.age,
            "view": names[view],
            "person_in_prompt": target.person and said,
        }
        prompt = TextConditions(prompt=caption.prompt(names[view], target.person))
        cases.append(Case(case_id, stable_seed("augmentation case", seed, case_id) % 2**31, 1, prompt, extra))
    return cases


def _missed(wanted: Sequence[Aim], weights: Floats) -> list[str]:
    """Aims that no choice of these reports meets."""
    got = [(aim, float(weights @ aim.values)) for aim in wanted]
    return [
        f"{aim.name}: {share:.1%} of the films instead of {aim.share:.1%}; the reports do not allow it together with the rest"
        for aim, share in got
        if abs(share - aim.share) > MISSED
    ]
