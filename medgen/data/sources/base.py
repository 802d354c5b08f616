"""What every manifest builder shares: the options, the quarantine, reading tables, and splitting by patient."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from medgen.config import Config
from medgen.data.ecg_records import ECGRecord
from medgen.data.echo_records import ECHO_VIEWS, EchoRecord, EchoView
from medgen.data.records import CXRRecord, Split, View
from medgen.data.visit_records import VisitSeries
from medgen.seeds import stable_seed


class SourceError(ValueError):
    """A data set's folder that is not in its own layout; the message says which file or column is wanted."""


class SourceOptions(Config):
    """What a builder may be asked."""

    views: tuple[View | EchoView, ...] = Field(("PA", "AP"), description="views to keep")
    val_fraction: float = Field(0.05, ge=0, lt=1, description="patients for validation where the set has no official split")
    test_fraction: float = Field(0.05, ge=0, lt=1, description="patients for testing where the set has no official split")
    seed: int = Field(0, description="changes who goes where in a split that is not official")
    ecg_hours: float = Field(24.0, ge=0, description="an ECG of the same patient belongs to an echo up to so many hours away")
    frames: int = Field(12, ge=0, le=100, description="ACDC: frames from end-diastole to end-systole (0: those recorded)")
    contrast: str = Field("T1w", pattern=r"^[A-Za-z0-9]+$", description="BIDS: which image of a session, by its file's ending")
    command: str = Field("", description="BIDS: run on every image, with {input} and {output}")

    @model_validator(mode="after")
    def _possible(self) -> SourceOptions:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave no patient to train on")
        if self.frames == 1:
            raise ValueError("frames must be 0 (those recorded) or at least 2 (end-diastole and end-systole)")
        return self


@dataclass(frozen=True)
class Quarantined:
    """A record that cannot be used, and why."""

    record_id: str
    reason: str


@dataclass(frozen=True)
class Annotated:
    """An echo record with the arrays of its annotations file, which `build` writes beside the manifest.

    "masks" `[K, H, W]` uint8 (1 LV cavity, 2 myocardium, 3 left atrium) of the frames "mask_frames" `[K]`, "ed_frames", "es_frames".
    """

    record: EchoRecord
    arrays: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Unwritten:
    """A series whose images `build` lets `make` write first: `make(home)` gives visit id → reason of each image it could not write.

    The record's images are named relative to `home`, the manifest's folder; `make` leaves alone what an earlier run wrote.
    """

    record: VisitSeries
    make: Callable[[Path], Mapping[str, str]]


# Files are given relative to the data set's folder; `build` makes them relative to the manifest's.
Records: TypeAlias = Iterator["CXRRecord | EchoRecord | ECGRecord | VisitSeries | Annotated | Unwritten | Quarantined"]


@dataclass(frozen=True)
class Source:
    """One data set's builder. `unpack` turns a set that is not files (npz, Zarr) into a folder below the manifest's, first."""

    summary: str
    records: Callable[[Path, SourceOptions], Records]
    unpack: Callable[[Path, Path], Path] | None = None
    views: tuple[View | EchoView, ...] = ("PA", "AP")


def hashed_split(patient_id: str, options: SourceOptions) -> Split:
    """The split of a patient by hash: the same on every machine, whatever other patients there are."""
    position = stable_seed("split", options.seed, patient_id) / 2**63
    if position < options.test_fraction:
        return "test"
    return "val" if position < options.test_fraction + options.val_fraction else "train"


def read_rows(path: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a .csv, .tsv or their .gz (UTF-8, with or without a byte-order mark) that has the columns `needed`.

    Raises `SourceError` naming the missing file or columns.
    """
    if not path.is_file():
        raise SourceError(f"no file at {path}")
    how = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, **how) if path.suffix == ".gz" else path.open(**how) as file:  # type: ignore[call-overload]
        try:
            reader = csv.DictReader(file, delimiter="\t" if path.name.endswith((".tsv", ".tsv.gz")) else ",")
            missing = [column for column in needed if column not in (reader.fieldnames or ())]
            if missing:
                raise SourceError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}")
            for row in reader:
                yield {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            raise SourceError(f"{path} cannot be read as CSV (damaged?): {error}") from None


def one_file(root: Path, *patterns: str) -> Path:
    """The first file below `root` that matches one of `patterns`, tried in order. Raises `SourceError` naming them."""
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if found:
            return found[0]
    raise SourceError(f"{root} holds none of {', '.join(patterns)}; is this the data set's folder?")


def read_info(path: Path) -> dict[str, str]:
    """The "Key: value" lines of a .cfg (CAMUS, ACDC), keys in lower case; nothing if it is not there."""
    if not path.is_file():
        return {}
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {key.strip().lower(): value.strip() for key, sign, value in lines if sign}


def as_id(text: str) -> str:
    """A record id from a path or name: letters, digits and . _ - only."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")
    return name or f"record-{stable_seed(text):x}"


def as_age(text: str) -> float | None:
    """Years from "58", "058Y" (DICOM, NIH), "18M" or "" (unknown); MIMIC-like stand-ins above 130 are unknown."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([YMWD]?)", text.strip().upper())
    if match is None:
        return None
    years = float(match.group(1)) / {"": 1.0, "Y": 1.0, "M": 12.0, "W": 52.18, "D": 365.25}[match.group(2)]
    return years if years <= 130 else None


def as_sex(text: str) -> Literal["F", "M"] | None:
    """F or M from "F", "Female", "male" ...; None for anything else."""
    first = text.strip()[:1].upper()
    return cast(Literal["F", "M"], first) if first in ("F", "M") else None


def as_date(text: str) -> str | None:
    """ISO date from 21800506, 2180-05-06 or 2180-05-06T...; otherwise None."""
    match = re.match(r"(\d{4})-?(\d{2})-?(\d{2})(?!\d)", text.strip())
    if match is None or not (1 <= int(match.group(2)) <= 12 and 1 <= int(match.group(3)) <= 31):
        return None
    return "-".join(match.groups())


def as_view(text: str) -> View:
    """The view in a data set's own words ("PA", "postero-anterior", "AP LLD", "LL", "Frontal" ...)."""
    words = text.strip().upper().replace("_", " ").replace("-", " ")
    tokens = set(words.split())
    if tokens & {"LATERAL", "LL", "RL", "XTABLE", "LAT", "LAO", "RAO", "LPO", "RPO", "SWIMMERS", "OBLIQUE"}:
        return "LATERAL"
    if "PA" in tokens or "POSTERO" in words or "POSTEROANTERIOR" in words:
        return "PA"
    if "AP" in tokens or "ANTERO" in words or "ANTEROPOSTERIOR" in words:
        return "AP"
    return "UNKNOWN"


def as_echo_view(text: str) -> EchoView:
    """The view in a data set's own words ("4CH", "apical four chamber", "A2C", "PLAX", "Parasternal short axis ..."); else UNKNOWN."""
    words = re.sub(r"[^A-Z0-9]+", " ", text.upper()).strip()
    joined = words.replace(" ", "")
    if joined in ECHO_VIEWS:
        return joined
    words = words.replace("FOUR", "4").replace("TWO", "2").replace("CHAMBERS", "CHAMBER").replace("CH ", "CHAMBER ")
    if "PARASTERNAL" in words or re.search(r"\bP[LS]AX?\b", words):
        return "PSAX" if "SHORT" in words or re.search(r"\bPSAX?\b", words) else "PLAX"
    found = re.search(r"\b(?:AP?|APICAL)? ?([24]) ?(?:C|CH|CHAMBER)\b", words)
    return cast(EchoView, f"A{found.group(1)}C") if found else "UNKNOWN"


def as_time(text: str) -> str | None:
    """ISO date and time from "2180-05-06 12:30:00", DICOM's 20160503121535.5 ...; None for anything else, or a date alone."""
    digits = re.sub(r"[-:T ]", "", text.strip())
    match = re.match(r"(\d{14})(\.\d{1,6})?", digits)
    if match is None:
        return None
    try:
        moment = datetime.strptime(match.group(1), "%Y%m%d%H%M%S")
    except ValueError:
        return None
    return moment.replace(microsecond=round(float(match.group(2) or 0) * 1e6) % 1_000_000).isoformat()


def as_number(text: str | None) -> float | None:
    """A finite number from a table's cell; None for anything else."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None
