"""What a study's arms can show: every case of a manifest or of a sampled folder, with its files and what balances it. No pixels yet.

Real images come from manifests only, and only from the splits that the protocol names; synthetic ones from folders that `medgen sample`
wrote, and only those. Whatever says otherwise of itself is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, Manifest, Record, is_below, manifest_kind, read_manifest
from medgen.data.report_labels import label_text
from medgen.data.report_text import ReportError, report_to_prompt
from medgen.data.visit_records import VisitSeries
from medgen.study.protocol import Arm, Protocol, ProtocolError, find_generated, find_manifest
from medgen.study.tasks import Kind

RECORD_OF: Mapping[Kind, type[Record]] = {"chest": CXRRecord, "echo": EchoRecord, "progression": VisitSeries}
DIGITAL = "medgen digital"  # how the manifests of digital patients say what they are


@dataclass(frozen=True)
class Frame:
    """A picture of a series: its file, when it was taken (in the series' unit), and whether it was generated."""

    path: Path
    time: float = 0.0


@dataclass(frozen=True)
class Ecg:
    """The ECG of a clip: frame 0 is at second `start` of its clock."""

    path: Path
    start: float


@dataclass(frozen=True)
class Candidate:
    """One case that an arm can show. `past` and `future` are visits in order; for single pictures and clips `future` is that one.

    `facts` are what arms can be balanced by; `text` is what the image was made from, or its report. `section`: the one it was sampled for.
    """

    arm: str
    source: str
    case_id: str
    patient: str
    record_ids: tuple[str, ...]
    future: tuple[Frame, ...]
    past: tuple[Frame, ...] = ()
    seed: int | None = None
    text: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    ejection_fraction: float | None = None
    ecg: Ecg | None = None
    fps: float | None = None
    time_unit: str = "days"
    section: str | None = None

    @property
    def name(self) -> str:
        """What no other candidate of any arm is called."""
        return f"{self.arm}/{self.case_id}/{self.future[-1].path.name}"

    @cached_property
    def findings(self) -> Mapping[str, str]:
        """Findings that the text names: present, absent or uncertain."""
        return {label.name: label.state for label in label_text(self.text)}

    def value(self, balance: str) -> str:
        """Of a field that arms are balanced by; "unknown" where the case does not say."""
        return self.facts.get(balance) or self.findings.get(balance, "unknown")


@dataclass(frozen=True)
class Pool:
    """An arm's candidates, in the order of their source. `digital`: they are digital patients; `listed`: how many before the split."""

    arm: Arm
    where: Path
    candidates: tuple[Candidate, ...]
    digital: bool = False
    listed: int = 0


def read_pools(protocol: Protocol, generated: Path | None, reference: Path | None) -> dict[str, Pool]:
    """Every arm that a section uses, by name. Raises `ProtocolError` (or the manifest's error) for whatever cannot be used."""
    used = {arm.name for section in protocol.sections for arm in protocol.arms_of(section)}
    return {arm.name: read_pool(protocol, arm, generated, reference) for arm in protocol.arms if arm.name in used}


def read_pool(protocol: Protocol, arm: Arm, generated: Path | None, reference: Path | None) -> Pool:
    """One arm's candidates."""
    kind = protocol.kind(arm)
    if arm.source != "synthetic":
        return _real(arm, _manifest(protocol, arm, reference))
    folder = find_generated(arm, generated)
    try:
        patients = _manifest(protocol, arm, reference)
    except ProtocolError:
        if kind == "progression" or arm.reference is not None:  # a course needs the patient's past; a film may stand alone
            raise
        patients = None
    return Pool(arm, folder, tuple(_sampled(arm, kind, folder, patients)))


def _manifest(protocol: Protocol, arm: Arm, reference: Path | None) -> Manifest[Any]:
    kind = protocol.kind(arm)
    given = Path(arm.reference) if arm.reference is not None else reference
    if given is not None and (given / "metadata.jsonl").is_file() and not list(given.glob("**/manifest.parquet")):
        raise ProtocolError(
            f"arm {arm.name!r} is {arm.source}, but {given} is a folder of samples (metadata.jsonl): they are synthetic; "
            "give the manifest of real images"
        )
    path = find_manifest(protocol, arm, reference)
    expected = RECORD_OF[kind]
    if (found := manifest_kind(path)) != expected.kind:
        raise ProtocolError(f"arm {arm.name!r} shows {kind}, but {path} lists records of kind {found!r}, not {expected.kind!r}")
    return read_manifest(path, record=expected)


# ---------------------------------------------------------------- real


def _real(arm: Arm, manifest: Manifest[Any]) -> Pool:
    digital = manifest.source.startswith(DIGITAL)
    kept = [record for record in manifest.records if record.split in arm.splits]
    if not kept:
        raise ProtocolError(
            f"arm {arm.name!r}: none of the {len(manifest)} records of {manifest.root} is in split {' or '.join(arm.splits)}; "
            "real images must not be those that the generator was trained on. If none is, name the splits in the protocol"
        )
    for record in kept:
        if _says_synthetic(record.extra) and not digital:
            raise ProtocolError(
                f"arm {arm.name!r} is {arm.source}, but record {record.record_id} of {manifest.root} is marked synthetic"
            )
    made = (_candidate(arm, manifest, record) for record in kept)
    return Pool(arm, manifest.root, tuple(c for c in made if c is not None), digital, len(manifest))


def _says_synthetic(values: Mapping[str, Any]) -> bool:
    return str(values.get("synthetic", "")).lower() in ("true", "yes", "1")


def _candidate(arm: Arm, manifest: Manifest[Any], record: Any) -> Candidate | None:
    blank = Candidate(arm.name, arm.source, record.record_id, record.patient_id, (record.record_id,), ())
    facts = _facts(record)
    if isinstance(record, CXRRecord):
        return replace(blank, future=(Frame(manifest.path(record.image)),), text=_text(record), facts=facts)
    if isinstance(record, EchoRecord):
        ecg = None
        if record.ecg is not None and record.pairing == "beat_synchronous":
            ecg = Ecg(manifest.path(record.ecg), record.ecg_offset)
        clip = (Frame(manifest.path(record.video)),)
        return replace(blank, future=clip, facts=facts, ejection_fraction=record.ejection_fraction, ecg=ecg, fps=record.fps)
    frames = tuple(Frame(manifest.path(str(visit.image)), visit.time) for visit in record.imaged)
    if not frames:
        return None
    return replace(blank, future=frames, text=record.imaged[-1].report, facts=facts, time_unit=record.time_unit)


def _facts(record: Any) -> dict[str, str]:
    """Sex, view and the like of a record, as words."""
    own = {"sex": getattr(record, "sex", None), "view": getattr(record, "view", None)}
    if isinstance(record, VisitSeries):
        own = {**record.covariates, "view": record.visits[-1].view}
    elif isinstance(record, CXRRecord):
        own |= {label.name: label.state for label in record.labels}
    return {name: str(value) for name, value in own.items() if value is not None}


def _text(record: CXRRecord) -> str:
    """The report as `medgen study sample` makes a prompt of it, so that both arms' texts read alike."""
    try:
        return report_to_prompt(record.findings, record.impression)
    except ReportError:
        return ""


# ---------------------------------------------------------------- synthetic


def _sampled(arm: Arm, kind: Kind, folder: Path, patients: Manifest[Any] | None) -> Iterator[Candidate]:
    path = folder / "metadata.jsonl"
    records = {} if patients is None else {record.record_id: record for record in patients.records}
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            line = json.loads(text)
            case, name = str(line["case_id"]), str(line.get("frames_file") or line["file_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"{where}: not a line of samples ({error!r})") from None
        if line.get("synthetic") is not True:
            raise ProtocolError(f"{where}: not marked synthetic, but arm {arm.name!r} is; a real arm is given as a manifest")
        found: Kind = "echo" if "frames_file" in line else "progression" if "frames" in line else "chest"
        if found != kind:
            raise ProtocolError(f"{where} is of kind {found}, but arm {arm.name!r} shows {kind}")
        record = records.get(str(line.get("record_id", case)))
        patient = str(line.get("patient_id") or (case if record is None else record.patient_id))
        known = {**({} if record is None else _facts(record)), **line.get("covariates", {})}
        known |= {key: line[key] for key in ("sex", "view") if line.get(key)}
        candidate = Candidate(
            arm.name, arm.source, case, patient, () if record is None else (record.record_id,), (), seed=line.get("seed"),
            text=str(line.get("prompt", "")), section=line.get("section"),
            facts={k: str(v) for k, v in known.items() if k in ("sex", "view")},
        )  # fmt: skip
        if kind == "progression":
            yield _future(candidate, line, folder, patients, where)
        elif kind == "echo":
            clip = (Frame(_below(folder, name, where)),)
            ef = line.get("ejection_fraction")
            ecg = _ecg(line, folder, patients)
            yield replace(candidate, future=clip, ejection_fraction=ef, ecg=ecg, fps=line.get("fps"))
        else:
            yield replace(candidate, future=(Frame(_below(folder, name, where)),))


def _future(candidate: Candidate, line: Mapping[str, Any], folder: Path, patients: Manifest[Any] | None, where: str) -> Candidate:
    assert patients is not None
    past = tuple(Frame(_below(patients.root, str(seen["image"]), where), float(seen["time"])) for seen in line["past"])
    future = tuple(Frame(_below(folder, str(frame["file_name"]), where), float(frame["time"])) for frame in line["frames"])
    last = past[-1].time if past else float("-inf")
    later = tuple(frame for frame in future if frame.time > last)  # what lies between known visits is no course
    return replace(candidate, past=past, future=later or future, time_unit=str(line.get("time_unit") or "days"))


def _ecg(line: Mapping[str, Any], folder: Path, patients: Manifest[Any] | None) -> Ecg | None:
    """The ECG that a clip was made from, if it can still be found: below the samples, beside them, or below the manifest."""
    name, start = line.get("ecg"), line.get("ecg_start")
    if name is None or start is None or not is_below(str(name)):
        return None
    roots = [folder, folder.parent, *([] if patients is None else [patients.root])]
    for path in (root / str(name) for root in roots):
        if path.is_file() or path.with_name(path.name + ".hea").is_file():
            return Ecg(path, float(start))
    return None


def _below(root: Path, name: str, where: str) -> Path:
    path = root / name
    if not is_below(name) or not path.resolve().is_relative_to(root.resolve()):
        raise ProtocolError(f"{where}: {name!r} leads out of {root}")
    if not path.is_file():
        raise ProtocolError(f"{where}: {name} is missing from {root}; sample again, or copy the whole folder")
    return path
