"""The quality gate: the judge must see in an image what its prompt states present, on its side, and not see what it negates.

What the judge itself cannot read well on real films it is not asked about: the gate abstains there and says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medgen.data.records import FINDINGS, FindingLabel
from medgen.data.report_labels import label_text
from medgen.models.classifier import OUTPUTS, SIDED_FINDINGS, FindingClassifier
from medgen.sampling.cases import Case
from medgen.sampling.gates import GateError, Verdict

JUDGE = Path(__file__).resolve().parent.parent / "pretrained" / "digital_chest_judge"
VALIDATION = "validation.json"
READABLE_AUROC = 0.8  # on held-out real films; below it the judge is not asked
_labels = lru_cache(maxsize=4096)(label_text)


class QualityGate:
    """A gate (`medgen.sampling.gates.Gate`) around a `FindingClassifier` and its validation on held-out real films.

    The score is the smallest margin over everything checked, in logits: how far the judge's output is from its threshold on the
    asked side, so 0 is the limit. `unmentioned`: what the prompt does not mention must not be seen either, as labels read it.
    `validated`: the judge was measured on held-out real films; what the gate itself stops, `check_quality_gate` measures
    (`medgen.augmentation.quality_check`).
    """

    name = "quality"

    def __init__(self, judge: FindingClassifier, validation: dict[str, Any], fingerprint: str, unmentioned: bool = False) -> None:
        if judge.outputs != OUTPUTS:
            raise GateError(f"the judge has the outputs {', '.join(judge.outputs)}; the quality gate needs {', '.join(OUTPUTS)}")
        self.judge, self.fingerprint, self.unmentioned = judge.eval(), fingerprint, unmentioned
        measured = validation.get("outputs", {})
        self.auroc = {name: measured.get(name, {}).get("auroc") for name in OUTPUTS}
        self.abstains = tuple(name for name, area in self.auroc.items() if area is not None and area < READABLE_AUROC)
        self.validated = any(value is not None for value in self.auroc.values())
        self._limits = torch.logit(judge.thresholds.double().clamp(1e-6, 1 - 1e-6))
        self._images = int(validation.get("images", 0))

    @classmethod
    def load(cls, folder: Path | None, unmentioned: bool = False) -> QualityGate:
        """The gate around the judge in `folder` (its export, with validation.json), or the shipped one. Raises `GateError`."""
        folder = JUDGE if folder is None else Path(folder)
        weights = folder / "diffusion_pytorch_model.safetensors"
        if not weights.is_file() or not (folder / "config.json").is_file():
            raise GateError(
                f"{folder} holds no finding classifier (config.json and safetensors); `medgen train classifier` makes one"
            )
        try:
            validation = json.loads((folder / VALIDATION).read_text()) if (folder / VALIDATION).is_file() else {}
        except ValueError as error:
            raise GateError(f"{folder / VALIDATION} is damaged: {error}") from None
        judge = FindingClassifier.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        assert isinstance(judge, FindingClassifier)
        return cls(judge, validation, hashlib.sha256(weights.read_bytes()).hexdigest(), unmentioned)

    def describe(self) -> dict[str, Any]:
        """What decides its verdicts."""
        return {
            "judge": self.judge.config.get("patients", ""),
            "judge_sha256": self.fingerprint,
            "threshold": 0.0,
            "thresholds": {name: round(float(p), 6) for name, p in zip(OUTPUTS, self.judge.thresholds, strict=True)},
            "abstains": {name: self.auroc[name] for name in self.abstains},
            "unmentioned": self.unmentioned,
            "validated": self.validated,
            "validated_on_films": self._images,
        }

    def check(self, images: Tensor, cases: Sequence[Case[Any]]) -> list[Verdict]:
        """One verdict for each of `images` [B,1,H,W] in [-1,1]; each is looked at alone, so that no verdict depends on another."""
        return [self.verdict(image[None], _labels(case.conditions.prompt)) for image, case in zip(images, cases, strict=True)]

    @torch.inference_mode()
    def verdict(self, image: Tensor, labels: Sequence[FindingLabel]) -> Verdict:
        """Whether `image` [1,1,H,W] in [-1,1] shows what `labels` state."""
        size = (int(self.judge.config["image_size"]),) * 2
        if image.shape[-2:] != size:
            image = functional.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        parameter = next(self.judge.parameters())
        logits = self.judge(image.to(parameter.device, parameter.dtype))[0].double().cpu()
        margins = dict(zip(OUTPUTS, (logits - self._limits).tolist(), strict=True))
        checked = dict(self._requirements(labels, margins))
        failed = [reason for reason, margin in checked.items() if margin < 0]
        asked = {label.name for label in labels if label.state != "uncertain"}
        silent = [name for name in self.abstains if name in asked]
        note = f"; not judged: {', '.join(silent)} (the judge cannot read it)" if silent else ""
        return Verdict(not failed, min(checked.values(), default=0.0), ("; ".join(failed) or "as the prompt says") + note)

    def _requirements(self, labels: Sequence[FindingLabel], margins: dict[str, float]) -> list[tuple[str, float]]:
        """(what is wrong if the margin is negative, margin) of everything that can be checked."""
        stated: dict[str, FindingLabel] = {label.name: label for label in labels}
        found: list[tuple[str, float]] = []
        for name in FINDINGS:
            label = stated.get(name)
            if name in self.abstains or (label is None and not self.unmentioned) or (label and label.state == "uncertain"):
                continue
            if label is None or label.state == "absent":
                found.append((f"{name} seen, {'negated' if label else 'not mentioned'}", -margins[name]))
                continue
            found.append((f"{name} not seen", margins[name]))
            if label.side and name in SIDED_FINDINGS:
                found += self._sides(name, label.side, margins)
        return found

    def _sides(self, name: str, side: str, margins: dict[str, float]) -> list[tuple[str, float]]:
        left, right = f"{name}_left", f"{name}_right"
        if left in self.abstains or right in self.abstains:
            return []
        if side == "bilateral":
            return [(f"{name} not seen on both sides", min(margins[left], margins[right]))]
        here, there = (left, right) if side == "left" else (right, left)
        return [(f"{name} not seen on the {side}", margins[here]), (f"{name} on the other side", margins[here] - margins[there])]
