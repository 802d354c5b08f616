"""The standard echo cases of a held-out manifest: patients as they come, and the controls that show whether the video follows the ECG.

The folder that is written stands alone: cases.jsonl, the ECGs (ecg/) and first frames (first_frames/) that it names. Extra fields travel
through sampling into metadata.jsonl, where evaluation finds them:
purpose     population, shift, shuffle, absent, ef, heart_rate, irregular, joined, one or diversity
pair_id     clips that share a seed and differ in one thing; `variant` says in which, `shift_s` by how many s later the ECG's events come
r_true, t_end_true    R peaks and T ends of the ECG given, s from frame 0; own_r, own_t: of the record the case is about
record_id, patient_id, rhythm
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medgen.data.echo_records import EchoRecord
from medgen.data.records import Split, read_manifest
from medgen.data.video import load_video
from medgen.evaluation.echo.heart_rate import mean_rate
from medgen.evaluation.echo.videos import Truth, read_truth
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.statistics import Floats
from medgen.seeds import stable_seed

Cases = list[dict[str, Any]]
SHIFTS = (-0.25, 0.2, 0.35)  # of an RR interval: not so far that another beat could be taken for it
FRACTIONS = (20, 30, 40, 50, 60, 70)  # percent
RATES = (40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140)  # bpm
SLOW = 80.0  # bpm below which a clip needs twice the frames to hold two beats


@dataclass(frozen=True)
class _Held:
    """A held-out record whose ECG runs with its video."""

    record: EchoRecord
    root: Path
    truth: Truth

    @property
    def seconds(self) -> float:
        return (self.record.frames - 1) / self.record.fps

    @property
    def rate(self) -> float:
        """bpm during the clip."""
        return mean_rate(self.truth.r_peaks, self.seconds)

    @property
    def irregular(self) -> bool:
        r = self.truth.r_peaks
        gaps = np.diff(r[(r > -1.5) & (r < self.seconds + 1.5)])
        return len(gaps) > 0 and bool((np.abs(gaps / np.median(gaps) - 1) > 0.15).any())


def write_echo_cases(
    reference: Path,
    out: Path,
    long: tuple[Path, ...] = (),
    n: int = 96,
    shifts: int = 16,
    controls: int = 24,
    grid: int = 6,
    irregular: int = 24,
    joined: int = 6,
    one: int = 8,
    repeats: int = 6,
    frames: int | None = None,
    first_frames: bool = True,
    seed: int = 0,
    split: Split | None = "test",
) -> Path:
    """Write the standard echo cases for `medgen sample ecg-to-echo --cases OUT`, with the ECGs and frames they need beside the file.

    The defaults ask for about 415 times the frames of one clip: 14 minutes at 2 s a clip.

    Args:
        reference: manifest of held-out clips with beat-synchronous ECGs.
        out: file to write (.jsonl); its folder also receives ecg/ and first_frames/.
        long: further held-out manifests, for example long clips of atrial fibrillation, used for irregular rhythms and joined windows.
        n: clips of the population: own ECG, EF, view and first frame.
        shifts: patients whose ECG is given as it is and twice shifted in time.
        controls: patients given another patient's ECG, and as many given none.
        grid: patients asked for every EF from 20 to 70; a third as many ECGs of every rate from 40 to 140 bpm.
        irregular: long clips of atrial fibrillation and premature beats.
        joined: clips four times as long as the others.
        one: patients whose first frame is held while rate, EF or ECG change one at a time.
        repeats: patients with three further clips from other seeds.
        frames: of a clip; the reference's own if not given.
        first_frames: give the own first frame where it was taken at frame 0; never in controls, since a frame tells the phase.
        seed: of the choice and of the noise.
        split: which split of the manifests; all of them with None.
    """
    held = _read(reference, split)
    far = [h for path in long for h in _read(path, split, required=False)] or held
    writer = _Writer(out.parent, frames or int(np.median([h.record.frames for h in held])), seed, first_frames)
    out.parent.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(stable_seed("echo cases", seed)).permutation(len(held))
    held = [held[i] for i in order]
    regular = [h for h in held if not h.irregular and np.isfinite(h.rate)]
    if len(regular) < 2:
        raise EvaluationError(
            f"{reference}: {len(regular)} held-out clips with a regular, beat-synchronous ECG; at least 2 are needed"
        )
    cases = [
        *_population(writer, held[:n], repeats),
        *_shifts(writer, regular[:shifts]),
        *_controls(writer, held[:controls]),
        *_fractions(writer, regular[max(0, len(regular) - grid) :]),
        *_rates(writer, regular, -(-grid // 3)),
        *_long(writer, far, irregular, joined),
        *_one_at_a_time(writer, regular, one),
    ]
    out.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return out


def _read(path: Path, split: Split | None, required: bool = True) -> list[_Held]:
    manifest = read_manifest(path, None, record=EchoRecord)
    kept = [r for r in manifest.records if split is None or r.split == split or not required]
    held = [_Held(r, manifest.root, read_truth(manifest.root, r)) for r in kept if r.ecg is not None]
    held = [h for h in held if h.record.pairing == "beat_synchronous" and len(h.truth.r_peaks) > 1]
    if not held:
        raise EvaluationError(
            f"{path}: no clip of split {split!r} has a beat-synchronous ECG with two beats: nothing can be timed"
        )
    return held


@dataclass(frozen=True)
class _Writer:
    """Makes case lines and copies the files that they name below `folder`."""

    folder: Path
    frames: int
    seed: int
    first_frames: bool

    def case(self, name: str, purpose: str, held: _Held, given: _Held | None = None, **changes: Any) -> dict[str, Any]:
        """A case about `held` with the ECG of `given` (default: its own). `start`: frame 0 in s of the given clip's time.

        `changes` replace fields; ecg=None withholds the ECG.
        """
        given = given or held
        start = float(changes.pop("start", 0.0))
        seed_name = changes.pop("seed_name", name)
        line: dict[str, Any] = {
            "case_id": name,
            "ecg": self._ecg(given),
            "ecg_start": round(start + given.record.ecg_offset, 6),
            "ejection_fraction": held.record.ejection_fraction,
            "view": None if held.record.view == "UNKNOWN" else held.record.view,
            "num_frames": self.frames,
            "fps": held.record.fps,
            "seed": stable_seed("echo case", self.seed, seed_name) % 2**31,
            "n": 1,
            "purpose": purpose,
            "record_id": held.record.record_id,
            "patient_id": held.record.patient_id,
            "rhythm": str(given.record.truth.get("rhythm", "")),
        }
        line |= changes
        seconds = line["num_frames"] / line["fps"]
        if line["ecg"] is None:
            line["ecg_start"] = None
        else:
            line |= {
                "r_true": _near(given.truth.r_peaks - start, seconds),
                "t_end_true": _near(given.truth.t_ends - start, seconds),
            }
        line |= {"own_r": _near(held.truth.r_peaks, seconds), "own_t": _near(held.truth.t_ends, seconds)}
        return {key: value for key, value in line.items() if value is not None}

    def first_frame(self, held: _Held) -> str:
        path = self.folder / "first_frames" / f"{held.record.record_id}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(load_video(held.root / held.record.video, held.record.fps).frames[0]).save(path)
        return f"first_frames/{path.name}"

    def still(self, held: _Held, start: float = 0.0) -> dict[str, Any]:
        """The own first frame, if the clip starts where it was taken."""
        return {"first_frame": self.first_frame(held)} if self.first_frames and start == 0 else {}

    def _ecg(self, held: _Held) -> str:
        """WFDB records are copied with their signal files, another kind of file as it is."""
        source = held.root / str(held.record.ecg)
        wfdb = source.suffix in (".hea", ".dat") or not source.is_file()
        stem = source.with_suffix("") if source.suffix in (".hea", ".dat") else source
        folder = self.folder / "ecg"
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(stem.parent.glob(f"{stem.name}.*")) if wfdb else [source]:
            if not (folder / file.name).is_file():
                shutil.copyfile(file, folder / file.name)
        return f"ecg/{stem.name}.hea" if wfdb else f"ecg/{source.name}"


def _near(events: Floats, seconds: float) -> list[float | None]:
    """Events from 3 s before the clip to 3 s after it, as JSON holds them."""
    return [None if np.isnan(t) else round(float(t), 4) for t in events if np.isnan(t) or -3 < t < seconds + 3]


def _population(writer: _Writer, held: Sequence[_Held], repeats: int) -> Iterator[dict[str, Any]]:
    """Own ECGs, EF and first frames; of the first few without a first frame and from several seeds."""
    for number, h in enumerate(held):
        yield writer.case(f"population-{number:03d}", "population", h, **writer.still(h))
    for number, h in enumerate(held[:repeats]):
        yield writer.case(f"diversity-{number:03d}", "diversity", h, n=3)


def _shifts(writer: _Writer, held: Sequence[_Held]) -> Iterator[dict[str, Any]]:
    """The own ECG as it is and twice shifted, from one noise; no first frame, which would tell the phase."""
    for number, h in enumerate(held):
        pair: dict[str, Any] = {"pair_id": f"shift-{number:03d}", "seed_name": f"shift-{number:03d}"}
        yield writer.case(f"shift-{number:03d}-base", "shift", h, variant="base", **pair)
        for k, share in enumerate(SHIFTS[number % 2 : number % 2 + 2]):
            delta = round(share * 60 / h.rate, 4)
            yield writer.case(f"shift-{number:03d}-{k}", "shift", h, start=-delta, variant=f"shift{k}", shift_s=delta, **pair)


def _controls(writer: _Writer, held: Sequence[_Held]) -> Iterator[dict[str, Any]]:
    """The same patients and noise with the next patient's ECG, and with none; no first frame."""
    for number, h in enumerate(held):
        seed_name, other = f"control-{number:03d}", held[(number + 1) % len(held)]
        yield writer.case(f"shuffle-{number:03d}", "shuffle", h, other, seed_name=seed_name)
        yield writer.case(f"absent-{number:03d}", "absent", h, ecg=None, seed_name=seed_name)


def _fractions(writer: _Writer, held: Sequence[_Held]) -> Iterator[dict[str, Any]]:
    for number, h in enumerate(held):
        for fraction in FRACTIONS:
            extra: dict[str, Any] = {
                "ejection_fraction": float(fraction),
                "pair_id": f"ef-{number:02d}",
                "seed_name": f"ef-{number:02d}",
            }
            yield writer.case(f"ef-{number:02d}-{fraction}", "ef", h, **extra)


def _rates(writer: _Writer, regular: Sequence[_Held], each: int) -> Iterator[dict[str, Any]]:
    """The regular ECGs nearest to every rate of the grid; slow ones in clips long enough for two beats."""
    for rate in RATES:
        for k, h in enumerate(sorted(regular, key=lambda h: abs(h.rate - rate))[:each]):
            slow = h.rate < SLOW
            frames = 2 * writer.frames if slow else writer.frames
            start = _centred(h, frames)
            extra: dict[str, Any] = {"start": start, "num_frames": frames, "asked_rate": rate, **writer.still(h, start)}
            yield writer.case(f"rate-{rate}-{k}", "heart_rate", h, **extra)


def _centred(held: _Held, frames: int) -> float:
    """Start (s of the clip's time) of a window of `frames` in the middle of the recorded clip: its ECG reaches beyond it on both sides."""
    return min(0.0, (held.seconds - (frames - 1) / held.record.fps) / 2)


def _long(writer: _Writer, held: Sequence[_Held], irregular: int, joined: int) -> Iterator[dict[str, Any]]:
    """Irregular rhythms in clips of up to three windows, and clips of four windows."""
    uneven = [h for h in held if h.irregular]
    uneven.sort(key=lambda h: str(h.record.truth.get("rhythm", "")) not in ("af", "pvc"))
    for number, h in enumerate(uneven[:irregular]):
        longest = int((h.seconds + 2 * min(h.record.ecg_offset, 1.0)) * h.record.fps)
        frames = min(max(longest, writer.frames), 3 * writer.frames)
        start = _centred(h, frames)
        yield writer.case(f"irregular-{number:03d}", "irregular", h, num_frames=frames, start=start, **writer.still(h, start))
    for number, h in enumerate(sorted(held, key=lambda h: -h.record.frames)[:joined]):
        frames = 4 * writer.frames
        start = _centred(h, frames)
        yield writer.case(f"joined-{number:03d}", "joined", h, num_frames=frames, start=start, **writer.still(h, start))


def _one_at_a_time(writer: _Writer, regular: Sequence[_Held], count: int) -> Iterator[dict[str, Any]]:
    """One first frame each; then an ECG about 40 bpm faster or slower (from the same phase on), an EF 25 points higher or lower, the ECG
    shifted by 0.3 beats, another seed."""
    usable = [h for h in regular if h.record.ejection_fraction is not None]
    for number, h in enumerate(usable[:count]):
        name = f"one-{number:02d}"
        common: dict[str, Any] = {"first_frame": writer.first_frame(h), "pair_id": name, "seed_name": name}
        own = float(h.record.ejection_fraction or 0)
        other = min(usable, key=lambda g: min(abs(g.rate - h.rate - 40), abs(g.rate - h.rate + 40)))
        yield writer.case(f"{name}-base", "one", h, variant="base", **common)
        start = _same_phase(h, other)
        yield writer.case(f"{name}-rate", "one", h, other, variant="heart_rate", start=start, **common)
        fraction = round(own - 25 if own > 45 else own + 25, 1)
        yield writer.case(f"{name}-ef", "one", h, variant="ejection_fraction", **{**common, "ejection_fraction": fraction})
        delta = round(0.3 * 60 / h.rate, 4)
        yield writer.case(f"{name}-shift", "one", h, variant="ecg_shift", start=-delta, shift_s=delta, **common)
        yield writer.case(f"{name}-seed", "one", h, variant="seed", **{**common, "seed_name": f"{name}-other"})


def _same_phase(held: _Held, other: _Held) -> float:
    """Second of the other clip's time at which its heart is in the phase in which `held` is at frame 0."""

    def share(truth: Truth, start: float) -> float:
        before = truth.r_peaks[truth.r_peaks <= start]
        after = truth.r_peaks[truth.r_peaks > start]
        return float((start - before[-1]) / (after[0] - before[-1])) if len(before) and len(after) else 0.0

    wanted = share(held.truth, 0.0)
    starts = np.arange(-0.4, 0.8, 0.01)
    return round(float(min(starts, key=lambda s: (abs(share(other.truth, float(s)) - wanted), abs(s)))), 3)
