"""From a protocol and its material to a blinded pack that readers open in a browser, and the key that stays outside it.

The same inputs and seed give the same bytes. The key's salt comes from the sources' own bytes, so that who knows this code and guesses the
seed still cannot rebuild the key without the images.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from medgen import __version__
from medgen.study.draw import Draft, draw
from medgen.study.items import Item, Secret, make_items, source_files
from medgen.study.material import Pool, read_pools
from medgen.study.media import Shape, Source, clip, common_shape, mp4_bytes, picture, png_bytes, stack
from medgen.study.orders import Order, orders
from medgen.study.protocol import Media, Protocol, ProtocolError, read_protocol
from medgen.study.responses import commitment

MTIME = 946_684_800  # 2000-01-01 UTC, of every file: when something was made says what it is
BANNER = "For research only, never for diagnosis. Any image may be synthetic."


@dataclass(frozen=True)
class Built:
    """A finished pack, its key beside it, and how many items it has."""

    pack: Path
    key: Path
    items: int
    sha256: str

    def __str__(self) -> str:
        return (
            f"{self.items} items in {self.pack} (sha256 {self.sha256[:12]}…); readers open {self.pack / 'index.html'}\n"
            f"{self.key} is the answer key: keep it from the readers\n"
            f"next: medgen study serve --pack {self.pack}, or give readers the folder; then medgen study analyze"
        )


def build(protocol: Path, out: Path, generated: Path | None = None, reference: Path | None = None) -> Built:
    """Build a blinded reader-study pack, and beside it the answer key that readers must never get.

    All that is not pixels is made alike in every arm. What is in the pixels stays: crop burnt-in text, borders and markers first.

    Args:
        protocol: the study's YAML file (see configs/study/).
        out: folder of the pack; the key is written to OUT.key.json.
        generated: folder of samples: GENERATED/<arm>/ of each synthetic arm, or one arm's own (what `medgen study sample` wrote).
        reference: manifest of the real images, or a folder with manifest.parquet or <kind>/manifest.parquet.

    Raises `ProtocolError`, `medgen.config.ConfigError` or the error of a file that cannot be read, before anything is written.
    """
    plan = read_protocol(Path(protocol))
    pack, key_file = Path(out), Path(out).with_name(Path(out).name + ".key.json")
    for path in (pack, key_file):
        if path.exists():
            raise ProtocolError(f"{path} is there already: give another --out (a pack that was read must stay as it is)")
    pools = read_pools(plan, None if generated is None else Path(generated), None if reference is None else Path(reference))
    drafts = draw(plan, pools)
    files = {path: hashlib.sha256(_real_bytes(path)).hexdigest() for path in source_files(plan, drafts)}
    _refuse_marked(drafts, pools)
    secret = Secret(plan.seed, files)
    items = make_items(plan, drafts, secret)
    reading = orders(plan, drafts, secret.rng)
    pack.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=pack.parent, prefix=f".{pack.name}.") as scratch:
        folder = Path(scratch) / "pack"
        study, sha256 = _write(folder, plan, pools, items, reading, secret)
        key = _key(plan, items, secret, files, sha256)
        _write_page(folder, study, key)
        _write_key(key_file, key)
        folder.replace(pack)
    return Built(pack, key_file, len(items), sha256)


# ---------------------------------------------------------------- sources


def _real_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProtocolError(
            f"cannot read {path}: {error.strerror}; every image that the manifest or metadata name must be there"
        ) from None


def _refuse_marked(drafts: Sequence[Draft], pools: Mapping[str, Pool]) -> None:
    """Real arms show nothing that says of itself that it is synthetic, but for digital patients, of whom readers are told."""
    shown = {c.name: c for draft in drafts for c in (draft.main, draft.partner) if c is not None}
    for candidate in shown.values():
        if candidate.source == "synthetic" or pools[candidate.arm].digital:
            continue
        for frame in candidate.future:
            if _marked(frame.path):
                raise ProtocolError(
                    f"arm {candidate.arm!r} is {candidate.source}, but {frame.path} is marked synthetic; give real images"
                )


def _marked(path: Path) -> bool:
    name = path.name.lower()
    if name.endswith(".png"):
        with Image.open(path) as image:
            return str(image.info.get("Synthetic", "")).lower() == "true"
    if name.endswith((".nii", ".nii.gz")):
        import nibabel

        return bytes(nibabel.load(path).header["descrip"]).upper().startswith(b"SYNTHETIC")
    if name.endswith((".mp4", ".avi", ".mkv")):
        import av

        with av.open(str(path)) as container:
            return "SYNTHETIC" in container.metadata.get("title", "").upper()
    if name.endswith((".dcm", ".dicom", ".ima")):
        import pydicom

        return str(pydicom.dcmread(path, stop_before_pixels=True, force=True).get((0x0008, 0x001C), "")).endswith("'YES'")
    return False


# ---------------------------------------------------------------- the pack's files


def _write(
    folder: Path, plan: Protocol, pools: Mapping[str, Pool], items: Sequence[Item], reading: Mapping[str, Order], secret: Secret
) -> tuple[dict[str, Any], str]:
    """Media, protocol and orders; returns what the page holds and the pack's hash."""
    (folder / "media").mkdir(parents=True)
    (folder / "orders").mkdir()
    places = sorted(range(len(items)), key=lambda i: (plan.sections.index(items[i].draft.section), items[i].id))
    shapes: dict[str, Shape] = {}
    media: dict[str, list[dict[str, Any]]] = {}
    for section in plan.sections:
        own = [item for item in items if item.draft.section is section]
        by_arm: dict[str, list[Source]] = {}
        for item in own:
            by_arm.setdefault(item.draft.arm.name, []).extend(item.sources)
        shapes[section.name] = common_shape(f"section {section.name!r}", by_arm, plan.media)
        media |= _write_media(folder / "media", own, shapes[section.name], plan.media, secret)
    listed = {items[i].id: _shown_item(items[i], media[items[i].id]) for i in places}
    frozen = json_bytes(_frozen(plan, pools, shapes))
    (folder / "protocol.json").write_bytes(frozen)
    ids = [item.id for item in items]
    readers = {
        reader: {"order": [ids[i] for i in order.items], "sessions": list(order.sessions)} for reader, order in reading.items()
    }
    for reader, entry in readers.items():
        (folder / "orders" / f"{reader}.json").write_bytes(json_bytes({"study_id": plan.study_id, "reader": reader, **entry}))
    sha256 = pack_sha256(folder, listed, readers)
    study = {
        "study_id": plan.study_id,
        "title": plan.title,
        "pack_sha256": sha256,
        "instructions": _instructions(plan, pools),
        "washout_days": plan.washout_days,
        "readers": readers,
        "items": listed,
    }
    return study, sha256


def pack_sha256(folder: Path, items: Mapping[str, Any], readers: Mapping[str, Any]) -> str:
    """What names a pack: the hash over its media, its frozen protocol, its items and its orders."""
    lines = [f"{_digest(path)}  {path.name}" for path in [*sorted((folder / "media").iterdir()), folder / "protocol.json"]]
    lines += [hashlib.sha256(json_bytes(part)).hexdigest() for part in (items, readers)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def json_bytes(value: Any) -> bytes:
    """Readable JSON, the same for the same value."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_media(
    folder: Path, items: Sequence[Item], shape: Shape, media: Media, secret: Secret
) -> dict[str, list[dict[str, Any]]]:
    """The media of one section's items, with their description for the page."""
    described: dict[str, list[dict[str, Any]]] = {}
    clips: list[tuple[str, Source]] = []
    for item in items:
        described[item.id] = []
        for i, shown in enumerate(item.shown):
            entry: dict[str, Any] = {"label": shown.label} if shown.label else {}
            names = [secret.name(16, "media", item.id, i, j) for j in range(max(len(shown.sources), media.slices))]
            first = shown.sources[0]
            if first.kind == "video":
                entry |= {"file": f"media/{names[0]}.mp4", "kind": "video", "fps": round(shape.fps, 6)}
                clips.append((names[0], first))
            else:
                sequence = first.kind == "stack" or bool(shown.labels)
                grey = stack(first, shape, media) if first.kind == "stack" else [picture(s, shape, media) for s in shown.sources]
                for name, values in zip(names, grey, strict=False):
                    (folder / f"{name}.png").write_bytes(png_bytes(values))
                entry |= {"file": f"media/{names[0]}.png", "kind": "image"}
                if sequence:
                    labels = shown.labels or tuple(f"slice {k + 1}" for k in range(len(grey)))
                    frames = [{"file": f"media/{n}.png", "label": label} for n, label in zip(names, labels, strict=False)]
                    entry |= {"kind": "stack" if first.kind == "stack" else "sequence", "frames": frames}
                entry |= {"width": shape.side, "height": shape.side}
            described[item.id].append(entry | ({"reveal": True} if shown.reveal else {}))
    if clips:
        width, height = _write_clips(folder, clips, shape, media)
        for entries in described.values():
            for entry in entries:
                entry |= {"width": width, "height": height}
    return described


def _write_clips(folder: Path, clips: Sequence[tuple[str, Source]], shape: Shape, media: Media) -> tuple[int, int]:
    """All clips of a section at once, since their frames are filled up to the largest; returns their width and height."""
    frames = {source: clip(source, shape, media) for _, source in clips}
    files = dict(zip(frames, mp4_bytes(list(frames.values()), shape.fps), strict=True))
    for name, source in clips:
        (folder / f"{name}.mp4").write_bytes(files[source])
    _, height, width, _ = next(iter(frames.values())).shape
    return width + width % 2, height + height % 2


def _shown_item(item: Item, media: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": item.draft.section.task,
        "section": item.draft.section.name,
        "media": media,
        **({"prompt": item.prompt} if item.prompt else {}),
        "questions": list(item.questions),
        "training": item.draft.training,
        "feedback": item.feedback,
    }


def _frozen(plan: Protocol, pools: Mapping[str, Pool], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The protocol as it was before reading: claims and design, without seed, paths, or what would name an item's arm."""
    sections = []
    for section in plan.sections:
        shape, arms = shapes[section.name], plan.arms_of(section)
        clips = {"frames": shape.frames, "fps": shape.fps, "ecg": shape.lead} if shape.fps else {}
        sections.append(
            {
                **section.model_dump(mode="json", exclude={"arms", "questions"}),
                "sources": sorted({arm.source for arm in arms}),
                "synthetic_arms": sum(arm.source == "synthetic" for arm in arms),
                "shown_at": {"px": shape.side, **clips},
            }
        )
    kept = {"study_id", "title", "hypotheses", "margin", "design", "groups", "sessions", "washout_days", "media"}
    return {
        **plan.model_dump(mode="json", include=kept),
        "readers": list(plan.reader_ids),
        "real_images": "digital patients (computed)" if any(pool.digital for pool in pools.values()) else "patients",
        "real_from_splits": sorted(
            {split for pool in pools.values() if pool.arm.source != "synthetic" for split in pool.arm.splits}
        ),
        "sections": sections,
        "built_with": f"medgen {__version__}",
    }


def _instructions(plan: Protocol, pools: Mapping[str, Pool]) -> str:
    """What readers are told before they begin, as paragraphs; the page explains each task where it comes."""
    told = [BANNER]
    if any(pool.digital for pool in pools.values()):
        told.append("In this study “real” means images of digital patients: computed phantoms, not people.")
    if any(section.training for section in plan.sections):
        told.append("A task may begin with practice cases: they tell you the answer afterwards and are not counted.")
    if plan.sessions > 1:
        told.append(f"You read in {plan.sessions} sittings, at least {plan.washout_days} days apart.")
    told.append("Read alone, do not discuss cases before everybody has finished, and do not look files up.")
    told += [part.strip() for part in plan.instructions.split("\n\n") if part.strip()]
    return "\n\n".join(told)


# ---------------------------------------------------------------- page, sums and key


def _key(plan: Protocol, items: Sequence[Item], secret: Secret, files: Mapping[Path, str], sha256: str) -> dict[str, Any]:
    kept = {}
    for item in items:
        drawn = [c for c in (item.draft.main, item.draft.partner) if c is not None]
        kept[item.id] = {
            "arm": item.draft.arm.name,
            "source": item.draft.arm.source,
            "case_id": item.draft.main.case_id,
            "record_ids": sorted({name for candidate in drawn for name in candidate.record_ids}),
            "seed": item.draft.main.seed,
            "files_sha256": [files[source.path] for source in item.sources],
            "repeat_of": item.repeats,
            "section": item.draft.section.name,
            "correct": item.correct,
        }
    return {
        "study_id": plan.study_id,
        "pack_sha256": sha256,
        "salt": secret.salt,
        "seed": plan.seed,
        "items": dict(sorted(kept.items())),
    }


def _write_page(folder: Path, study: Mapping[str, Any], key: Mapping[str, Any]) -> None:
    """The page, the key's commitment and the sums of all files; then every file gets the same time."""
    from medgen.study.viewer import VERSION, render

    (folder / "index.html").write_text(render({**study, "version": VERSION}), "utf-8")
    (folder / "key_commitment.json").write_bytes(json_bytes({"salted_sha256": commitment(key)}))
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())
    sums = "".join(f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / "SHA256SUMS").write_text(sums, "utf-8")
    _set_times([*files, folder / "SHA256SUMS", folder / "media", folder / "orders", folder])


def _set_times(paths: Iterable[Path]) -> None:
    for path in paths:
        os.utime(path, (MTIME, MTIME))
        path.chmod(0o755 if path.is_dir() else 0o644)


def _write_key(path: Path, key: Mapping[str, Any]) -> None:
    """Readable by its owner alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(0o600)
        temporary.write_bytes(json_bytes(key))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
