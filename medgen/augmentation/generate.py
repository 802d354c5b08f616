"""`medgen augment generate`: a plan's prompts through the sampler and its gates, and the films back as a manifest like any other."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.augmentation.attempts import attempts_of, rejections
from medgen.augmentation.clip_generate import MANIFEST, generate_clips
from medgen.augmentation.contact_sheet import SHEET, by_stratum, compare_sheet
from medgen.augmentation.plan import rarest_first, stratum
from medgen.augmentation.planned import CASES, PlanError, read_facts
from medgen.augmentation.target import Counts, count, count_records
from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, FindingLabel, read_manifest, write_manifest
from medgen.evaluation.statistics import wilson
from medgen.sampling.cases import Case, TextConditions, read_cases
from medgen.sampling.output import METADATA, REJECTED
from medgen.sampling.quality_gate import QualityGate
from medgen.sampling.request import CONTACT_SHEET, RESERVED, Dtype
from medgen.sampling.sampler import jobs_of
from medgen.sampling.text_to_cxr import sample

SUMMARY = "augmentation.json"
TextCase = Case[TextConditions]


@dataclass(frozen=True)
class Generated:
    """What `generate` left: `films` (or clips, as `items` says) of the `planned` ones; `complete` when no shard has work left."""

    out: Path
    films: int
    planned: int
    complete: bool
    notes: tuple[str, ...] = ()
    items: str = "films"
    sheet: str = SHEET

    def __str__(self) -> str:
        if not self.complete:
            return f"{self.out}: this shard is done; the rest of {self.planned} {self.items} is up to the other shards"
        head = f"{self.out / MANIFEST}: {self.films} of {self.planned} planned {self.items}; see {self.out / self.sheet}"
        return head + "".join(f"\n  {note}" for note in self.notes)


def generate(
    plan: Path,
    pipeline: str,
    out: Path,
    quality: str | None = None,
    privacy: Path | None = None,
    retries: int = 3,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
    shard: str | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    threads: int = 1,
    progress: bool = True,
) -> Generated:
    """Generate a plan's films or clips: a sampled folder with manifest.parquet; of films also a sheet beside real ones, and a count of
    what gates rejected.

    The same command again continues an interrupted folder and does nothing on a finished one.

    Args:
        plan: folder that `medgen augment plan` wrote.
        pipeline: a shipped pipeline's name (`digital_chest`) or a pipeline folder.
        out: folder to write into.
        quality: judge that must see what the prompt states and not what it negates: `shipped`, or a classifier's export folder.
        privacy: folder of a privacy gate (`medgen audit gate`): no film too near one of a training patient.
        retries: further attempts at a film that a gate rejected; after the last one it is missing, and counted.
        steps: denoising steps; the pipeline's own number if not given.
        guidance: classifier-free guidance scale; the pipeline's own if not given.
        batch_size: films in flight at once.
        shard: this process's part of the work, "0/3" for the first of three.
        device: cpu, cuda, ...; the best there is if not given.
        dtype: precision of the network.
        threads: CPU threads of each film.
        progress: a progress line on the terminal; --no-progress hides it.
    """
    if (facts := read_facts(plan)).get("kind") == EchoRecord.kind:
        if quality or privacy:
            raise PlanError("no gate judges echo clips yet: leave --quality and --privacy out")
        return _clips(plan, facts, pipeline, out, steps=steps, guidance=guidance, batch_size=batch_size, shard=shard, device=device,
                      dtype=dtype, threads=threads, progress=progress)  # fmt: skip
    facts, cases = read_plan(plan)
    gates: list[Any] = [QualityGate.load(None if quality == "shipped" else Path(quality))] if quality else []
    gates += [privacy] if privacy else []
    done = sample(
        pipeline, out, cases=cases, steps=steps, guidance=guidance, batch_size=batch_size, shard=shard, device=device, dtype=dtype,
        threads=threads, progress=progress, gates=gates, retries=retries,
    )  # fmt: skip
    planned = len(jobs_of(cases))
    if not done.complete:
        return Generated(out, done.new, planned, False)
    lines = _lines(out / METADATA)
    if not lines:
        raise PlanError(f"every attempt at every film was rejected; {out / REJECTED} says why")
    records = [record_of(line) for line in lines]
    source = f"medgen augment generate: {facts['captions']} captions, target {facts['target']['base']}"
    write_manifest(records, out / MANIFEST, name=f"synthetic-{facts['manifest']['name']}", source=source)
    summary = summarise(facts, cases, lines, _lines(out / REJECTED))
    (out / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    real, problem = _real_films(plan, facts)
    films = by_stratum([(line["stratum"], out / line["file_name"]) for line in lines])
    (out / SHEET).write_bytes(compare_sheet(real, films))
    return Generated(out, len(records), planned, True, (*summary["notes"], *([problem] if problem else [])))


def _clips(plan: Path, facts: Mapping[str, Any], pipeline: str, out: Path, **options: Any) -> Generated:
    planned, done = sum(facts["planned"].values()), generate_clips(plan, facts, pipeline, out, **options)
    if done is None:
        return Generated(out, 0, planned, False, items="clips")
    return Generated(out, done.clips, planned, True, done.notes, "clips", CONTACT_SHEET)


def summarise(
    facts: Mapping[str, Any], cases: Sequence[TextCase], kept: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What came of a plan: films by finding, asked and delivered; attempts and rejections by gate and by group; what to beware of."""
    by_id = {case.case_id: case.extra for case in cases}
    asked, delivered = (_counted([by_id[name] for name in names]) for names in (by_id, [line["case_id"] for line in kept]))
    groups = rejections(attempts_of(by_id, kept, rejected))
    first: Mapping[str, Any] = next((line["gates"] for line in [*kept, *rejected] if line.get("gates")), {})
    gates = {name: _gate_facts(name, bool(said["validated"]), kept, rejected) for name, said in first.items()}
    missing = sorted(set(by_id) - {line["case_id"] for line in kept})
    notes = [f"gate {name} is not validated" for name, one in gates.items() if not one["validated"]]
    notes += [f"{len(missing)} of {len(by_id)} films are missing: every attempt was rejected"] * bool(missing)
    notes += [f"{one}; the films that are left are the easier ones of this group" for one in groups if one.biased]
    return {
        "plan": {key: facts[key] for key in ("manifest", "captions", "target", "notes")},
        "asked": dataclasses.asdict(asked),
        "delivered": dataclasses.asdict(delivered),
        "attempts": len(kept) + len(rejected),
        "gates": gates,
        "rejections": [{**dataclasses.asdict(one), "biased": one.biased} for one in groups],
        "missing": missing,
        "notes": notes,
    }


def _gate_facts(
    name: str, validated: bool, kept: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    mine = [line for line in rejected if not line["gates"][name]["passed"]]
    said = (reason for line in mine for reason in line["gates"][name]["reason"].split("; "))
    reasons = Counter(reason for reason in said if not reason.startswith("not judged"))
    rate = wilson(len(mine), len(kept) + len(rejected))
    return {"validated": validated, "rejected": len(mine), "rate": rate.as_dict(), "reasons": dict(reasons.most_common())}


def _counted(extras: Sequence[Mapping[str, Any]]) -> Counts:
    return count([([FindingLabel(**x) for x in e["labels"]], e["sex"], e["age"], e["view"]) for e in extras])


def _real_films(plan: Path, facts: Mapping[str, Any]) -> tuple[dict[str, list[Path]], str | None]:
    """The real films by stratum; none, and why, where the plan's manifest is not the one it was."""
    path = plan / facts["manifest"]["path"]
    if not path.is_file():
        return {}, f"no manifest at {path} any more: the sheet shows synthetic films only"
    real = read_manifest(path, facts["manifest"]["split"])
    if real.sha256 != facts["manifest"]["sha256"]:
        return {}, f"{path} has changed since the plan: the sheet shows synthetic films only"
    rarest = rarest_first(count_records(real.records))
    films = [(stratum(record.labels, rarest), real.image_path(record)) for record in real.records]
    return by_stratum(films), None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def read_plan(folder: Path) -> tuple[dict[str, Any], list[TextCase]]:
    """A plan's facts and cases. Raises `PlanError` for a folder that is none, `CaseError` for a damaged one."""
    return read_facts(folder), read_cases(folder / CASES, TextConditions, RESERVED)


def record_of(line: Mapping[str, Any]) -> CXRRecord:
    """The record of one generated film; sex and age only where the prompt says them, for only then can the film show them."""
    name = Path(line["file_name"]).stem
    said = bool(line["person_in_prompt"])
    kept = ("synthetic", "model_sha256", "noise_seed", "attempt", "gates", "stratum")
    return CXRRecord(
        record_id=name,
        patient_id=f"synthetic-{line['case_id']}",
        study_id=f"synthetic-{name}",
        image=line["file_name"],
        view=line["view"],
        findings=line["findings"],
        impression=line["impression"],
        split="train",
        labels=tuple(FindingLabel(**label) for label in line["labels"]),
        age=line["age"] if said else None,
        sex=line["sex"] if said else None,
        extra={"pipeline": line["model"], **{key: line[key] for key in kept if key in line}},
    )
