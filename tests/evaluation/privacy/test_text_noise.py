from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from medgen.data.report_text import PromptConfig
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.privacy.predictor import NoisePredictor, load_predictor, predictor_of
from medgen.evaluation.privacy.subjects import Subjects, draw_subjects, read_apart
from medgen.evaluation.privacy.text_noise import norms_along_path, norms_at_films, text_noise


def sides(predictor: NoisePredictor, manifest: Path) -> tuple[Subjects, Subjects]:
    members, strangers = read_apart(manifest, manifest)
    return tuple(draw_subjects(side, predictor, PromptConfig(view=True), 12) for side in (members, strangers))  # type: ignore[return-value]


def test_captions_of_memorised_films_stand_out(leaky: Path, hospital: Path) -> None:
    predictor = load_predictor(leaky)
    train, heldout = sides(predictor, hospital)
    found = text_noise(predictor, train, heldout, steps=6, draws=2)
    # twelve films are memorised without their captions too, so that theirs pull less than captions that were never met
    assert found.auc.high < 0.5 and found.ratio.value < 1
    assert len(found.train) == len(found.heldout) == 12 and found.shared == 0
    assert found.strongest[0].norm == pytest.approx(max(found.train) / np.median(found.heldout), rel=1e-5)


def test_a_caption_has_one_norm_whatever_else_is_measured(leaky: Path, hospital: Path) -> None:
    predictor = load_predictor(leaky)
    train, _ = sides(predictor, hospital)
    alone = norms_along_path(predictor, train.prompts[3:4], steps=3, draws=2)
    together = norms_along_path(predictor, train.prompts[:6], steps=3, draws=2, batch_size=4)
    assert np.allclose(alone[0], together[3], rtol=1e-3)
    assert not np.allclose(alone[:, 0], alone[:, 1])  # another draw is other noise


def test_at_films_the_empty_caption_pulls_not_at_all(leaky: Path, hospital: Path) -> None:
    predictor = load_predictor(leaky)
    train, _ = sides(predictor, hospital)
    latents = predictor.latents(train.images([0, 1]))
    found = norms_at_films(predictor, ["", train.prompts[1]], latents, draws=1)
    assert found[0, 0] == 0 and found[1, 0] > 0


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_whatever_a_network_predicts_its_noise_is_found(leaky: Path, kind: str) -> None:
    """A perfect network's ε, recovered from what it returns for two films that have the same x_t."""
    known = load_predictor(leaky)
    if kind != "flow":
        prediction = {"epsilon": "epsilon", "v": "v_prediction"}[kind]
        known.pipeline.scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    predictor = predictor_of(known.pipeline)
    assert predictor.objective.config.kind == kind
    first, second, noise = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level = 0.5
    signal, sigma = predictor.coefficients(level)
    noisy = predictor.noised(first, noise, level)
    other_noise = (noisy - signal * second) / sigma
    outputs = [predictor.target(x0, eps, level) for x0, eps in ((first, noise), (second, other_noise))]
    expected = noise - other_noise
    assert torch.allclose((outputs[0] - outputs[1]) * predictor.noise_per_output(level), expected, atol=1e-4)


def test_too_few_captions_of_its_own_are_refused(leaky: Path, hospital: Path) -> None:
    predictor = load_predictor(leaky)
    train, _ = sides(predictor, hospital)
    with pytest.raises(EvaluationError, match="captions occur in both sets"):
        text_noise(predictor, train, train)
