"""The folder of a release: every file whole or absent, the same bytes from the same sample, continued after a kill.

Beside it, never in it, lies `OUT.sources.jsonl`: what is done, and which sample each file was made from (a sample's name may say whose
case it continues). In it lie `release.json` (what this is) and, last of all, `SHA256SUMS`: a release that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from medgen import __version__
from medgen.data.disk_cache import write_atomically
from medgen.export.source import ExportError, Made, file_sha256

SUMS, ABOUT = "SHA256SUMS", "release.json"
STATEMENT = "Synthetic data, made by a model. No patient is shown, and nothing here may be used to treat one."
T = TypeVar("T")


class Release:
    """One export into `out`. `settings` and what it is made from are fixed by the first call; another one is refused."""

    def __init__(self, out: Path, kind: str, made: Sequence[Made], settings: Mapping[str, Any]) -> None:
        self.out, self.kind, self._made = Path(out), kind, made
        self.log = self.out.with_name(f"{self.out.name}.sources.jsonl")
        if self.out.resolve() == made[0].folder.resolve() or made[0].folder.resolve() in self.out.resolve().parents:
            raise ExportError(f"--out {self.out} lies in the folder of the samples; a release is a folder of its own")
        request = {"release": kind, "settings": dict(settings), "medgen": __version__, "samples": _fingerprint(made)}
        try:
            self._done = self._claim(request)
        except OSError as error:
            raise ExportError(f"cannot write {self.out}: {error.strerror}; choose another --out") from None

    def _claim(self, request: dict[str, Any]) -> dict[str, dict[str, str]]:
        """The files of every finished item, by item, if this very export was begun before."""
        if not self.log.exists():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise ExportError(
                    f"{self.out} is not empty, and no export wrote it (there is no {self.log.name}); choose another --out"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            _save(self.log, (json.dumps(request) + "\n").encode())
        lines = self.log.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut by a kill
        try:
            before, *items = map(json.loads, lines)
            done = {item["item"]: item["files"] for item in items}
        except (ValueError, KeyError, TypeError):
            raise ExportError(f"{self.log} is damaged; delete it and {self.out}, and export again") from None
        for key in request:
            if before.get(key) != request[key]:
                what = (
                    "other samples, or samples that have changed"
                    if key == "samples"
                    else f"another request ({key}: {before.get(key)!r})"
                )
                raise ExportError(f"{self.out} was begun from {what}; choose another --out, or delete it with {self.log.name}")
        whole = sum(len(line) + 1 for line in lines)
        if whole < self.log.stat().st_size:
            os.truncate(self.log, whole)
        return done

    def has(self, item: str) -> bool:
        """Whether the files of `item` are there, as they were written."""
        files = self._done.get(item)
        return files is not None and all(
            (self.out / name).is_file() and file_sha256(self.out / name) == digest for name, digest in files.items()
        )

    def write(self, item: str, files: Mapping[str, bytes], made_from: Sequence[str] = ()) -> None:
        """Write one item's files (name below `out` → content); each is on disk when this returns. `made_from`: names of its samples."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        try:
            for name, content in files.items():
                _save(self.out / name, content)
            with self.log.open("ab") as log:
                log.write(json.dumps({"item": item, "made_from": list(made_from), "files": digests}).encode() + b"\n")
                log.flush()
                os.fsync(log.fileno())
        except OSError as error:
            raise ExportError(
                f"cannot write below {self.out}: {error.strerror}. What was finished is whole; free space or "
                "permissions, then the same command continues"
            ) from None
        self._done[item] = digests

    def items(self) -> dict[str, dict[str, str]]:
        """Every finished item's files with their SHA-256."""
        return dict(self._done)

    def finish(self, items: Sequence[str], about: Mapping[str, Any], further: Mapping[str, bytes] | None = None) -> None:
        """Write what the release says of itself, and its sums. `further` files are written again whenever they differ."""
        said = {
            "release": self.kind,
            "synthetic": True,
            "statement": STATEMENT,
            "medgen": __version__,
            **provenance(self._made),
            **about,
        }
        last = {**(further or {}), ABOUT: (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()}
        files = {name: digest for item in items for name, digest in self._done[item].items()}
        strange = [p for p in self._found() if p not in files and p not in last and p != SUMS]
        if strange:
            raise ExportError(
                f"{self.out} holds {strange[0]}, which no export wrote: take it out, then run the same command again"
            )
        for name, content in last.items():
            files[name] = hashlib.sha256(content).hexdigest()
            if not (self.out / name).is_file() or file_sha256(self.out / name) != files[name]:
                _save(self.out / name, content)
        sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
        _save(self.out / SUMS, sums.encode())

    def _found(self) -> list[str]:
        """Files in the folder, those of a killed write removed."""
        for leftover in self.out.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        return sorted(path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if not path.is_dir())


def provenance(made: Sequence[Made]) -> dict[str, Any]:
    """Which models made what, and how they were asked."""
    keys = ("model", "model_sha256", "num_inference_steps", "guidance_scale", "scheduler", "dtype", "device", "medgen", "torch")
    recipes = {json.dumps({key: one.line.get(key) for key in keys}, sort_keys=True) for one in made}
    return {"generators": [json.loads(recipe) for recipe in sorted(recipes)], "trajectories": len(made)}


def exported(steps: Iterable[T], total: int, what: str, shown: bool) -> Iterator[T]:
    """`steps` with a progress line on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn(f"exporting {what}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=total)
        for step in steps:
            yield step
            bar.advance(task)


def _fingerprint(made: Sequence[Made]) -> str:
    """One hash over the lines and the files of what is exported."""
    told = [[one.line, one.digests()] for one in made]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _save(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))
