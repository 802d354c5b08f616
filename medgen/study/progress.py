"""What the organiser sees of a running study: how far everyone is, and the answers as one CSV. Never whether an answer is right."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from medgen.study.responses import COLUMNS, Pack, safe_cell

SHOWN_COMMENTS = 50


def progress(pack: Pack, rows: Sequence[Mapping[str, str]], seen: Mapping[str, str]) -> dict[str, Any]:
    """Per reader: items whose required questions are all answered, median seconds of these, last seen; and the last comments.

    `rows`: last answers as the store has them; `seen`: when each reader last asked for anything, since the server started.
    """
    by_reader: dict[str, list[Mapping[str, str]]] = {reader: [] for reader in pack.orders}
    for row in rows:
        by_reader[row["reader"]].append(row)
    kinds = {(name, q["id"]): q["kind"] for name, item in pack.items.items() for q in item["questions"]}
    comments = [row for row in rows if kinds[row["item"], row["question"]] == "text" and row["answer"].strip()]
    comments.sort(key=lambda row: row["received"], reverse=True)
    readers = [_reader(pack, reader, own, seen.get(reader)) for reader, own in by_reader.items()]
    return {
        "study_id": pack.study_id,
        "title": pack.title,
        "pack_sha256": pack.sha256,
        "readers": readers,
        "done": sum(one["done"] for one in readers),
        "items": sum(one["items"] for one in readers),
        "comments": [
            {"reader": row["reader"], "item": row["item"], "text": row["answer"], "received": row["received"]}
            for row in comments[:SHOWN_COMMENTS]
        ],
    }


def _reader(pack: Pack, reader: str, rows: Sequence[Mapping[str, str]], seen: str | None) -> dict[str, Any]:
    answered: dict[str, set[str]] = {}
    times: dict[str, int] = {}
    for row in rows:
        answered.setdefault(row["item"], set()).add(row["question"])
        times[row["item"]] = times.get(row["item"], 0) + int(row["ms"])
    asked = [item for item in pack.orders[reader] if not pack.items[item].get("training")]
    done = [item for item in asked if _required(pack, item) <= answered.get(item, set())]
    last = max((moment for moment in (seen, *(row["received"] for row in rows)) if moment), default=None)
    seconds = round(median(times.get(item, 0) for item in done) / 1000, 1) if done else None
    return {"reader": reader, "done": len(done), "items": len(asked), "median_seconds": seconds, "last_seen": last}


def _required(pack: Pack, item: str) -> set[str]:
    return {q["id"] for q in pack.items[item]["questions"] if q.get("required", True)}


def responses_csv(pack: Pack, rows: Sequence[Mapping[str, str]]) -> str:
    """The last answers of all readers as a response file, safe to open in a spreadsheet."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    study = {"study_id": pack.study_id, "pack_sha256": pack.sha256}
    writer.writerows([safe_cell({**row, **study}[name]) for name in COLUMNS] for row in rows)
    return file.getvalue()
