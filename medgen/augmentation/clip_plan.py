"""A plan of synthetic echo clips: which ejection fractions a training set lacks, asked for with the ECGs of the patients who have them.

A case takes the ECG (if there is one), the view and the ejection fraction of one training clip, so that what an ECG tells of the heart
stays true; the heart itself comes from the noise. Bands of the ejection fraction are balanced by taking some clips more often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgen import __version__
from medgen.augmentation.balancing import Floats, balancing_weights, draw
from medgen.augmentation.plan_plot import draw_clip_plan
from medgen.augmentation.planned import PlanError, Planned, origin, refuse_shared_patients, write_plan
from medgen.data.echo_records import EchoRecord
from medgen.data.records import Split, read_manifest
from medgen.sampling.cases import Case, write_cases
from medgen.sampling.echo_cases import EchoAsked
from medgen.seeds import stable_seed

BAND = 10  # percent of ejection fraction
MOST_REPEATS = 10  # cases that one real clip may become
MISSED = 0.02
NO_ECGS = "Clips that come without an ECG are asked for without one: the model then chooses the heart rate."
REAL_ECGS = "The clips will show ECGs of real patients under them: treat this plan and the clips like those ECGs."


def plan_clips(manifest: Path, out: Path, target: str, n: int, split: Split, heldout: Path | None, seed: int) -> Planned:
    """`medgen augment plan` for a manifest of echo clips; `target` is balance (every band of ten points of ejection fraction that
    real clips have equally often), fill (balanced together with them) or real (as in them). Raises `PlanError`."""
    if target not in ("balance", "fill", "real"):
        raise PlanError(f"target {target!r}: of echo clips it is balance, fill or real (files are for films)")
    data = read_manifest(manifest, split, record=EchoRecord)
    if heldout is not None:
        refuse_shared_patients(data, read_manifest(heldout, record=EchoRecord))
    clips = [record for record in data.records if record.ejection_fraction is not None]
    bands = [band(record) for record in clips]
    if len(set(bands)) < 2:
        there = f"all between {bands[0]} %" if bands else "none has an ejection fraction"
        raise PlanError(f"{data.name}: of {len(data)} clips {there}; a network needs clips of different ejection fractions")
    if len(clips) * MOST_REPEATS < n:
        raise PlanError(f"{n} clips from {len(clips)} would repeat one more than {MOST_REPEATS} times; plan fewer")
    names = sorted(set(bands), key=lambda name: int(name.split()[0]))
    real = [bands.count(name) for name in names]
    wanted = _shares(target, np.array(real, dtype=float), n)
    inside: Floats = np.array([[name == one for name in names] for one in bands], dtype=float)
    weights = balancing_weights(inside, wanted, MOST_REPEATS / n)
    rng = np.random.default_rng(stable_seed("augmentation plan", seed))
    order = np.array(sorted(range(len(clips)), key=lambda i: (clips[i].ejection_fraction, clips[i].record_id)), dtype=np.intp)
    chosen = [clips[i] for i in rng.permutation(draw(weights, n, order, rng))]
    planned = [sum(band(record) == name for record in chosen) for name in names]
    notes = [
        f"ejection fraction {name} %: {share:.1%} of the clips instead of {aim:.1%}; there are too few real ones"
        for name, aim, share in zip(names, wanted, weights @ inside, strict=True)
        if abs(share - aim) > MISSED
    ]
    notes += [REAL_ECGS] * any(record.ecg for record in clips) + [NO_ECGS] * any(record.ecg is None for record in clips)
    facts = {
        "medgen": __version__, "kind": EchoRecord.kind, "manifest": origin(data, manifest, out, split), "seed": seed,
        "patients": len({record.patient_id for record in clips}), "target": {"base": target},
        "real": dict(zip(names, real, strict=True)), "planned": dict(zip(names, planned, strict=True)),
        "most_cases_of_one_clip": max(Counter(record.record_id for record in chosen).values()), "notes": notes,
    }  # fmt: skip
    write_plan(out, write_cases(_cases(chosen, seed)), facts, draw_clip_plan(names, real, planned))
    return Planned(out, n, tuple(notes), "clips")


def band(record: EchoRecord) -> str:
    """ "30 to 40": which ten points its ejection fraction lies in."""
    low = int(min(record.ejection_fraction or 0.0, 99.9) // BAND) * BAND
    return f"{low} to {low + BAND}"


def _shares(target: str, real: Floats, n: int) -> Floats:
    """What part of the clips each band shall have, [bands]."""
    if target == "real":
        return real / real.sum()
    if target == "balance":
        return np.full(len(real), 1 / len(real))
    for filled in range(len(real), 0, -1):  # the emptiest bands are filled to one level, as far as n clips reach
        lowest = np.sort(real)[:filled]
        level = (n + lowest.sum()) / filled
        if level >= lowest[-1]:
            break
    added: Floats = np.maximum(level - real, 0)
    return added / added.sum()


def _cases(chosen: Sequence[EchoRecord], seed: int) -> list[Case[EchoAsked]]:
    """One case for each clip; it names its ECG as the real manifest does, below that manifest's folder."""
    width, cases = len(str(len(chosen) - 1)), []
    for number, record in enumerate(chosen):
        case_id = f"plan-{number:0{width}d}"
        asked = EchoAsked(
            ecg=record.ecg,
            ecg_start=record.ecg_offset if record.pairing == "beat_synchronous" else None,
            ejection_fraction=record.ejection_fraction,
            view=None if record.view == "UNKNOWN" else record.view,
        )
        extra: dict[str, Any] = {"stratum": f"ejection fraction {band(record)} %", "ecg_of": record.record_id}
        cases.append(Case(case_id, stable_seed("augmentation case", seed, case_id) % 2**31, 1, asked, extra))
    return cases
