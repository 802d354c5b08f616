"""The pipeline as its user meets it: leads by any name, one lead, long recordings, seeds, and clear refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.data.ecg import ECG, LEADS, ECGError
from medgen.data.ecg_dataset import prepare_signals
from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.digital.ecg import simulate_ecg
from medgen.digital.rhythm import draw_rhythm
from medgen.models.denoiser import SequenceTransformer
from medgen.models.signal_autoencoder import SignalError, fit_signal_autoencoder
from medgen.pipelines.ecg_translation import ECGTranslationPipeline, OverlappingWindows


def an_ecg(seed: int = 0, seconds: float = 3.0) -> ECG:
    return simulate_ecg(draw_rhythm(seed, "sinus", 70, 0.0, seconds), seed, start=0.0, end=seconds, rate=250.0)[0]


@pytest.fixture(scope="module")
def pipeline() -> ECGTranslationPipeline:
    torch.manual_seed(0)
    signals = torch.stack([torch.from_numpy(an_ecg(seed).signal[:, ::2][:, :368]) for seed in range(4)])
    codec = fit_signal_autoencoder(LEADS, signals, torch.tensor([[name in ("I", "II", "V2") for name in LEADS]] * 4), 16, 8)
    denoiser = SequenceTransformer(8, 1, 1, patch_size=1, width=16, depth=1, heads=2, temporal_every=1, time_periods=(0.25, 8.0),
                                   feature_dim=codec.feature_width)  # fmt: skip
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    pipeline = ECGTranslationPipeline(
        codec, denoiser, Objective(ObjectiveConfig()).scheduler(), {"rate": 125}, window_frames=10, num_inference_steps=2
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_twelve_leads_from_three(pipeline: ECGTranslationPipeline) -> None:
    ecg = an_ecg()
    result = pipeline(ecg, given=("I", "II", "V2"), num_trajectories=3, generator=seeds(3))
    assert result.leads == LEADS and result.trajectories.shape == (1, 3, 12, 375)
    assert result.ecgs[0].rate == 125 and np.isfinite(result.ecgs[0].signal).all()
    np.testing.assert_allclose(result.ecgs[0].signal, result.trajectories[0].mean(0), atol=1e-6)
    made = dict(zip(LEADS, result.trajectories[0, 0]))
    np.testing.assert_allclose(made["III"], made["II"] - made["I"], atol=0.02)  # Einthoven
    assert not np.allclose(result.trajectories[0, 0, 8], result.trajectories[0, 1, 8])


def test_hidden_leads_change_nothing(pipeline: ECGTranslationPipeline) -> None:
    ecg = an_ecg()
    other = replace(ecg, signal=ecg.signal.copy())
    hidden = [i for i, name in enumerate(LEADS) if name not in ("I", "II", "V2")]
    other.signal[hidden] = np.nan
    other.signal[hidden[0]] = 5 * np.random.default_rng(0).standard_normal(ecg.signal.shape[1])
    one, two = (pipeline(e, given=("I", "II", "V2"), generator=seeds(1)).trajectories for e in (ecg, other))
    assert np.array_equal(one, two)
    shown = replace(ecg, signal=ecg.signal.copy())
    shown.signal[1] *= 0.5
    assert not np.array_equal(one, pipeline(shown, given=("I", "II", "V2"), generator=seeds(1)).trajectories)


def test_one_lead_by_any_name_at_any_rate(pipeline: ECGTranslationPipeline) -> None:
    ecg = an_ecg()
    watch = ECG(ecg.signal[1:2], ("Lead II",), 250.0)
    result = pipeline(watch, generator=seeds(1))
    assert result.given[0].tolist() == [name == "II" for name in LEADS]
    assert np.isfinite(result.trajectories).all()
    same = pipeline(ECG(ecg.signal[1:2, ::2], ("ii",), 125.0), generator=seeds(1))
    assert np.abs(same.trajectories - result.trajectories).max() < 0.1


def test_a_neighbour_changes_nothing_and_long_recordings_join(pipeline: ECGTranslationPipeline) -> None:
    ecgs = [an_ecg(seed, 5.0) for seed in (0, 1)]
    both = pipeline(ecgs, given=("II",), generator=seeds(2)).trajectories
    alone = pipeline(ecgs[0], given=("II",), generator=seeds(1)).trajectories
    assert both.shape[-1] == 625
    np.testing.assert_allclose(both[0], alone[0], atol=1e-4)


def test_a_window_that_fits_is_the_denoiser_itself() -> None:
    class Echo(torch.nn.Module):
        def forward(self, latents: torch.Tensor, *rest: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
            return 2 * latents

    latents = torch.randn(2, 25, 3, 1)
    frames = torch.zeros(2, 25)
    joined = OverlappingWindows(Echo(), 10)(latents, frames, frames, features=torch.zeros(2, 25, 1))
    torch.testing.assert_close(joined, 2 * latents)  # windows that agree are averaged to what they agree on


def test_flat_leads_are_not_used_and_that_is_told(pipeline: ECGTranslationPipeline) -> None:
    ecg = an_ecg()
    ecg.signal[7] = 0.0  # V2 has fallen off
    result = pipeline(ecg, given=("I", "II", "V2"), generator=seeds(1))
    assert not result.given[0, 7] and result.given[0, 1]
    assert np.isfinite(result.trajectories).all() and result.trajectories[0, 0, 7].std() > 0


def test_saved_and_loaded_it_gives_the_same(pipeline: ECGTranslationPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = ECGTranslationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    one, two = (p(an_ecg(), given=("II",), generator=seeds(1)).trajectories for p in (pipeline, loaded))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert not list(tmp_path.rglob("*.bin"))


def test_refusals(pipeline: ECGTranslationPipeline) -> None:
    ecg = an_ecg()
    with pytest.raises(SignalError, match=r"unknown signals V7; this model knows I"):
        pipeline(ecg, given=("V7",))
    with pytest.raises(SignalError, match="V1 given, but the recording has only II"):
        pipeline(ECG(ecg.signal[1:2], ("II",), 250.0), given=("II", "V1"))
    with pytest.raises(SignalError, match="3 generators for 1 trajectories"):
        pipeline(ecg, given=("II",), generator=seeds(3))
    with pytest.raises(SignalError, match="must be at least 1"):
        pipeline(ecg, given=("II",), num_inference_steps=0)
    broken = replace(ecg, signal=ecg.signal.copy())
    broken.signal[1, 100:400] = np.nan
    with pytest.raises((SignalError, ECGError), match="no usable"):
        pipeline(broken, given=("II",))
    with pytest.raises(SignalError, match="not finite"):
        pipeline.translate(torch.full((1, 12, 64), torch.nan), torch.ones(1, 12, dtype=torch.bool))


def test_the_shipped_weights_beat_the_linear_guess_from_one_lead() -> None:
    import medgen

    shipped = ECGTranslationPipeline.from_pretrained(Path(medgen.__file__).parent / "pretrained" / "digital_ecg_leads")
    shipped.set_progress_bar_config(disable=True)
    codec = shipped.autoencoder
    signals = torch.from_numpy(
        np.stack([prepare_signals([an_ecg(900 + i, 2.56)], LEADS, shipped.preparation)[0] for i in range(16)])
    )
    given = codec.given(["II"]).expand(16, -1)
    made = shipped.translate(signals, given, 4, 1, [torch.Generator().manual_seed(i) for i in range(64)]).mean(1)
    guess = codec.decode(torch.zeros(16, 20, 32, 1), codec.guess(signals, given), signals, given)
    error, linear = ((one - signals)[:, ~given[0]].square().mean().sqrt() for one in (made, guess))
    assert error < 0.95 * linear
