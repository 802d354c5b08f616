"""What a severity case asks for, and its film, ROI and stage prompts read, written and checked before anything is edited."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from medgen.data.images import ImageError, ImagePreprocessing, preprocess, read_grey, to_square
from medgen.sampling.cases import Case, CaseError, Conditions, Text
from medgen.sampling.recaptioner import Recaptioner, StageError, Stages


class SeverityAsked(Conditions):
    """Which film is edited, and how far.

    `image`: the film. `roi`: an image that is not black where editing is allowed (None: everywhere). `report`: what the film shows now.
    `target`: the finding and its severity that the last round shall show ("large left pleural effusion", "no pleural effusion"); or
    `stages`: a prompt of one's own for every round.
    """

    image: Text
    roi: Text | None = None
    report: Annotated[str, Field(strict=True)] = ""
    target: Text | None = None
    stages: tuple[Text, ...] | None = Field(None, min_length=1)


SeverityCase = Case[SeverityAsked]


@dataclass(frozen=True)
class Inputs:
    """A case's film [1,1,H,W] in [0,1] and ROI [1,1,H,W] bool (None: everywhere) at the model's size, its stages, its files' hashes."""

    film: Tensor
    roi: Tensor | None
    stages: Stages
    sha256: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """What the metadata say of them."""
        return {
            "source_prompt": self.stages.source,
            "finding": self.stages.finding,
            "side": self.stages.side,
            "direction": self.stages.direction,
            "degrees": list(self.stages.degrees),
            "stages_by": self.stages.written_by,
            "roi_share": 1.0 if self.roi is None else round(float(self.roi.float().mean()), 4),
            **{f"{name}_sha256": digest for name, digest in self.sha256.items()},
        }


def inspect(
    case: SeverityCase, root: Path | None, preprocessing: ImagePreprocessing, recaption: Recaptioner, rounds: int
) -> Inputs:
    """Read and check the files of `case`, and write its stages. Raises `CaseError` naming case and field."""
    asked, field = case.conditions, "image"
    try:
        film = preprocess(_file(asked.image, root), preprocessing)
        low, high = preprocessing.range
        film = ((film - low) / (high - low))[None]
        digests, roi = {"image": _digest(film)}, None
        if asked.roi is not None:
            field = "roi"
            roi = _region(_file(asked.roi, root), preprocessing)
            digests["roi"] = _digest(roi)
        field = "target"
        stages = _stages(asked, recaption, rounds)
    except (ImageError, StageError, CaseError, OSError) as error:
        raise CaseError(f"case {case.case_id!r}, field {field!r}: {error}") from None
    return Inputs(film, roi, stages, digests)


def _stages(asked: SeverityAsked, recaption: Recaptioner, rounds: int) -> Stages:
    if (asked.target is None) == (asked.stages is None):
        raise CaseError("give either a target (and the rounds' prompts are written) or the stages themselves")
    if asked.stages is not None:
        if not asked.report.strip():
            raise CaseError("stages of your own need the report too: what the film shows now")
        return Stages(asked.report.strip(), asked.stages, written_by="given")
    return recaption(asked.report, str(asked.target), rounds)


def _region(path: Path, preprocessing: ImagePreprocessing) -> Tensor:
    """[1,1,size,size] bool; brought to the film's geometry by the film's own way."""
    values = torch.from_numpy((read_grey(path) > 0).astype(np.float32))[None]
    region = to_square(values, preprocessing.size, preprocessing.pad)[None] >= 0.5
    if not region.any():
        raise CaseError(f"{path} marks nothing at {preprocessing.size} pixels; leave it out to edit everywhere")
    return region


def _file(text: str, root: Path | None) -> Path:
    """A file below `root` (None: the caller's own words, anywhere)."""
    path = Path(text) if root is None else root / text
    if root is not None and (Path(text).is_absolute() or not path.resolve().is_relative_to(root.resolve())):
        raise CaseError(f"{text!r} leads out of {root}; the files of a cases file lie below its folder (or below --root)")
    return path


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
