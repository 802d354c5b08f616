"""`medgen export wfdb`: the simulated ECGs behind echo clips as WFDB records, sample by sample, with synthetic ids and marks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from medgen import __version__
from medgen.export.recordings import MISSING, Recording, recording_of
from medgen.export.release import STATEMENT, Release, exported
from medgen.export.source import ExportError, Made, only, read_generated


def export(generated: Path, out: Path, ecg_root: Path | None = None, progress: bool = True) -> None:
    """Export the ECGs that clips were made from as WFDB records, each once. Only those whose headers say SYNTHETIC.

    The same command again continues an interrupted folder. OUT.sources.jsonl, beside the release, names the samples.

    Args:
        generated: a folder that `medgen sample ecg-to-echo` wrote.
        out: folder of the records, with their list in `RECORDS`.
        ecg_root: folder below which the ECGs of the clips' cases lie; without it, only shipped examples are found.
        progress: a progress line on the terminal; --no-progress hides it.
    """
    made = only(read_generated(generated), ("clip",), "WFDB records")
    found, reasons = dict[str, tuple[Made, Recording]](), list[str]()
    for one in made:
        recording, reason = recording_of(one, ecg_root)
        if recording is not None:
            found.setdefault(recording.sha256, (one, recording))
        else:
            reasons.append(f"{one.line['case_id']}: {reason}")
    if not found:
        raise ExportError(
            "none of these clips has an ECG that may be released:\n" + "\n".join(f"  {reason}" for reason in reasons[:10])
        )
    release = Release(out, "wfdb", made, {"ecgs": ecg_root is not None})
    for item in exported(found, len(found), "WFDB", progress):
        if not release.has(item):
            release.write(item, _record(*found[item]), [str(found[item][0].line["ecg"])])
    names = [name(recording) for _, recording in found.values()]
    release.finish(list(found), {"records": len(names)}, {"RECORDS": "".join(f"{n}\n" for n in sorted(names)).encode()})
    for reason in dict.fromkeys(reasons):
        print(f"not released: {reason}")
    print(f"{len(found)} records in {out}")


def name(recording: Recording) -> str:
    """The record's name, from its samples: several clips of one recording share it."""
    return f"SYN-{recording.sha256[:12]}"


def _record(made: Made, recording: Recording) -> dict[str, bytes]:
    import wfdb

    count, stem = len(recording.leads), name(recording)
    drove = f"drove synthetic echo {made.identity}, frame 0 at second {recording.start:g}"
    with tempfile.TemporaryDirectory() as scratch:
        wfdb.wrsamp(
            stem,
            fs=recording.rate,
            units=["mV"] * count,
            sig_name=list(recording.leads),
            d_signal=np.where(recording.samples == MISSING, MISSING, recording.samples).astype(np.int64),
            fmt=["16"] * count,
            adc_gain=[1000 / step for step in recording.microvolts],
            baseline=[0] * count,
            comments=["SYNTHETIC: simulated recording, of no person", STATEMENT, drove, f"medgen {__version__}"],
            write_dir=scratch,
        )
        return {file: (Path(scratch) / file).read_bytes() for file in (f"{stem}.hea", f"{stem}.dat")}
