"""The files that an echo case names: a shipped example, or a file below the cases' folder and nowhere else."""

from __future__ import annotations

from pathlib import Path

from medgen.sampling.cases import CaseError

EXAMPLES = Path(__file__).resolve().parent / "example_ecgs"


def example_ecgs() -> list[str]:
    """Names of the digital patients' ECGs that come with medgen."""
    return sorted(path.stem for path in EXAMPLES.glob("*.hea"))


def find_file(text: str, root: Path | None) -> Path:
    """The file that a case names: a shipped example, or a path; below `root` unless that is None (then any path is the user's own).

    A WFDB record goes by its stem, its .hea or its .dat. Raises `CaseError` for a path that leaves `root`, or leads nowhere.
    """
    if text in example_ecgs():
        return EXAMPLES / text
    path = Path(text) if root is None else root / text
    if path.suffix == ".dat":
        path = path.with_suffix(".hea")
    elif not path.is_file():
        path = Path(f"{path}.hea")
    # A link out of the folder leads out of it too, and a record is two files.
    parts = (path, path.with_suffix(".dat"))
    if root is not None and (Path(text).is_absolute() or not all(p.resolve().is_relative_to(root.resolve()) for p in parts)):
        raise CaseError(f"{text!r} leads out of {root}; the files of a cases file lie below its folder (or below --root)")
    if not path.is_file():
        hint = f"; shipped examples: {', '.join(example_ecgs())}" if root is None and "/" not in text else ""
        raise CaseError(f"there is no file {text}{hint}")
    return path
