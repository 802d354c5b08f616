"""A BIDS tree with sessions (OASIS-3, ADNI by Clinica, any other): one series per subject, one volume per session.

```
ROOT/participants.tsv                                     participant_id, age, sex, ...         optional
ROOT/sub-01/sub-01_sessions.tsv                           session_id, acq_time | days | age, ... optional
ROOT/sub-01/ses-d0129/sub-01_ses-d0129_scans.tsv          filename, acq_time                     optional
ROOT/sub-01/ses-d0129/anat/sub-01_ses-d0129[_run-1]_T1w.nii.gz
```
Times are days: a days column of sessions.tsv, acq_time, age in years, or the session's name (OASIS d0129 is a day, ADNI M06 a month).
A subject is read by one of these clocks only; what it leaves undated is quarantined. If no subject has a clock, the sessions' order is
the time. A session without an image is a visit without an image. `command` ("mri_synthstrip -i {input} -o {output}",
"antsRegistrationSyNQuick.sh ...") is run on every image; its results lie below the manifest's folder and are not made twice.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    Unwritten,
    as_id,
    as_number,
    hashed_split,
    read_rows,
)
from medgen.data.sources.visits import UNKNOWN, as_covariate, as_moment, covariates, days_since, in_order
from medgen.data.visit_records import Visit, VisitSeries

_DAYS = ("days", "day", "days_since_baseline", "days_from_baseline", "days_from_entry", "days_to_visit")
_MONTH = 365.25 / 12
Clock = dict[str, tuple[float, str | None]]  # session → days from any origin, and its ISO date


def records(root: Path, options: SourceOptions) -> Records:
    """One series per subject with the images whose names end in `contrast`."""
    subjects = sorted(path for path in root.glob("sub-*") if path.is_dir())
    if not subjects:
        raise SourceError(f"{root} holds no folder sub-*; is this a BIDS data set?")
    command = _command(options.command)
    table = root / "participants.tsv"
    people = {row["participant_id"]: row for row in read_rows(table, ["participant_id"])} if table.is_file() else {}
    clocks = {folder: _clock(folder) for folder in subjects}
    dated = any(len(clock) > 1 for clock in clocks.values())
    for folder in subjects:
        sessions = sorted((path for path in folder.glob("ses-*") if path.is_dir()), key=_natural) or [folder]
        images = {path.name: found for path in sessions if (found := _image(path, options.contrast)) is not None}
        order: Clock = {path.name: (float(index), None) for index, path in enumerate(sessions)}
        clock = clocks[folder] if dated else order
        rows = _sessions(folder)
        visits = []
        for name in dict.fromkeys([path.name for path in sessions] + list(rows)):
            if name in clock:
                visits.append(_visit(root, name, images.get(name), clock[name], rows.get(name, {})))
            elif name in images:
                why = (
                    "no clock in sessions.tsv, scans.tsv or its name"
                    if not clock
                    else "no time where its other sessions have one"
                )
                yield Quarantined(f"{folder.name}/{name}", f"undated: {why}")
        if not images or not visits:
            yield Quarantined(folder.name, f"no image at {folder.name}/ses-*/anat/*_{options.contrast}.nii[.gz]")
            continue
        ordered, held = in_order(folder.name, visits)
        yield from held
        record = VisitSeries(
            as_id(folder.name),
            folder.name,
            folder.name,
            ordered,
            "mr",
            3,
            "days" if dated else "order",
            hashed_split(folder.name, options),
            covariates=_covariates(people.get(folder.name, {})),
        )
        yield record if command is None else _processed(record, root, command)


def _visit(root: Path, name: str, images: list[Path] | None, when: tuple[float, str | None], row: dict[str, str]) -> Visit:
    facts = {key: known for key, value in row.items() if key != "session_id" and (known := as_covariate(value)) is not None}
    if images and len(images) > 1:
        facts["other_runs"] = ", ".join(path.name for path in images[1:])
    image = images[0].relative_to(root).as_posix() if images else None
    return Visit(visit_id=as_id(name), time=when[0], image=image, date=when[1], extra=facts)


def _covariates(row: dict[str, str]) -> dict[str, float | str]:
    row = {key: value.rstrip("+") if key == "age" else value for key, value in row.items()}  # BIDS writes "89+"
    return covariates({key: value for key, value in row.items() if key != "participant_id"})


def _image(session: Path, contrast: str) -> list[Path] | None:
    found = sorted((*session.glob(f"anat/*_{contrast}.nii.gz"), *session.glob(f"anat/*_{contrast}.nii")), key=_natural)
    return found or None


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _sessions(folder: Path) -> dict[str, dict[str, str]]:
    table = folder / f"{folder.name}_sessions.tsv"
    if not table.is_file():
        return {}
    rows = {row["session_id"]: row for row in read_rows(table, ["session_id"])}
    return {name if name.startswith("ses-") else f"ses-{name}": row for name, row in rows.items()}


def _clock(folder: Path) -> Clock:
    """Days of a subject's sessions by the clock that times most of them; the first of the list where several do."""
    rows = _sessions(folder)
    names = [path.name for path in sorted(folder.glob("ses-*")) if path.is_dir()] or [folder.name]
    columns = {key.lower(): key for row in rows.values() for key in row}
    clocks: list[Clock] = []
    for column in (columns[name] for name in _DAYS if name in columns):
        clocks.append({name: (days, None) for name, row in rows.items() if (days := as_number(row[column])) is not None})
    moments = {name: as_moment(_known(row, columns, "acq_time", "examination_date", "date")) for name, row in rows.items()}
    clocks.append(_dated(moments))
    clocks.append(_dated({name: _scanned(folder / name) for name in names}))
    if "age" in columns:
        ages = {name: as_number(row[columns["age"]]) for name, row in rows.items()}
        if any(age is not None and age % 1 for age in ages.values()):  # whole years order nothing
            clocks.append({name: (round(age * 365.25, 3), None) for name, age in ages.items() if age is not None})
    clocks.append({name: (days, None) for name in names if (days := _named(name)) is not None})
    if len(names) == 1:
        clocks.append({names[0]: (0.0, None)})  # one visit needs no clock
    best = max(clocks, key=lambda clock: sum(name in clock for name in names))
    origin = min((days for days, _ in best.values()), default=0.0)
    return {name: (round(days - origin, 5), date) for name, (days, date) in best.items()}


def _known(row: dict[str, str], columns: dict[str, str], *names: str) -> str:
    return next((row[columns[n]] for n in names if n in columns and row[columns[n]].lower() not in UNKNOWN), "")


def _dated(moments: Mapping[str, datetime | None]) -> Clock:
    known = {name: moment for name, moment in moments.items() if moment is not None}
    first = min(known.values(), default=None)
    return {} if first is None else {n: (days_since(first, m), m.date().isoformat()) for n, m in known.items()}


def _scanned(session: Path) -> datetime | None:
    table = next(iter(sorted(session.glob("*_scans.tsv"))), None)
    if table is None:
        return None
    times = [as_moment(row.get("acq_time", "")) for row in read_rows(table, ["filename"])]
    return min((time for time in times if time is not None), default=None)


def _named(session: str) -> float | None:
    match = re.fullmatch(r"ses-([dDmM])(\d+)", session)
    return None if match is None else int(match.group(2)) * (1.0 if match.group(1) in "dD" else _MONTH)


def _command(text: str) -> list[str] | None:
    """The words of `command`; no shell ever reads them. Raises `SourceError` if it cannot work."""
    if not text.strip():
        return None
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SourceError(f"command {text!r} cannot be split into words: {error}") from None
    if not all(any(place in word for word in words) for place in ("{input}", "{output}")):
        raise SourceError(
            f'command {text!r} must name {{input}} and {{output}}, as in "mri_synthstrip -i {{input}} -o {{output}}"'
        )
    if shutil.which(words[0]) is None:
        raise SourceError(f"command {words[0]!r} is not on this machine's PATH: install it, or give its whole path")
    return words


def _processed(record: VisitSeries, root: Path, command: list[str]) -> Unwritten:
    """The same series with its images below a folder named after the command, and what makes them."""
    folder = f"bids_{hashlib.sha256(' '.join(command).encode()).hexdigest()[:8]}"
    return Unwritten(record.below(f"{folder}/"), partial(_run_all, record, root, command, folder))


def _run_all(record: VisitSeries, root: Path, command: list[str], folder: str, home: Path) -> Mapping[str, str]:
    (home / folder).mkdir(parents=True, exist_ok=True)
    (home / folder / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    found = {visit.visit_id: _run(root / str(visit.image), home / folder / str(visit.image), command) for visit in record.imaged}
    return {name: reason for name, reason in found.items() if reason}


def _run(source: Path, target: Path, command: list[str]) -> str:
    """Make `target` of `source` unless it is there and newer; the reason if that failed. Whole or not at all."""
    if target.is_file() and target.stat().st_mtime >= source.stat().st_mtime:
        return ""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}.{target.name}")  # keeps the ending: tools choose the format by it
    words = [word.replace("{input}", str(source)).replace("{output}", str(temporary)) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False)
        if done.returncode or not temporary.is_file() or not temporary.stat().st_size:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["nothing"]
            how = f"ended with {done.returncode}" if done.returncode else "wrote no output"
            return f"command {how} for {source}; it said: {said[0][:200]}"
        temporary.replace(target)
    except OSError as error:
        return f"command cannot be run for {source}: {error}"
    finally:
        temporary.unlink(missing_ok=True)
    return ""
