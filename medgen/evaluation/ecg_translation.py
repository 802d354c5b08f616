"""`medgen evaluate ecg-translation`: generated ECG leads against the recorded ones, beside linear regression and controls."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medgen import __version__
from medgen.data.ecg import ECG, ECGPreparation, prepare_ecg
from medgen.data.ecg_dataset import SignalDataset
from medgen.data.ecg_records import ECGRecord
from medgen.data.records import Manifest, read_manifest
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.signal_measures import LinearRegression, Signals, correlation, f1, match_peaks
from medgen.evaluation.statistics import Floats, Indices, group_bootstrap
from medgen.pipelines.ecg_translation import ECGTranslationPipeline
from medgen.seeds import generator

SMALLEST_SET = 8
LAGS_SECONDS = 0.3  # reach of the regression that also sees before and after
TOLERANCES_MS = (50, 100)
EDGE_SECONDS = 0.25  # R peaks this close to an end are not asked for
METHODS = {
    "linear": "linear regression from the same instant",
    "linear_lagged": f"linear regression from {LAGS_SECONDS:g} s before to {LAGS_SECONDS:g} s after",
    "single": "one trajectory",
    "mean": "mean of all trajectories",
    "one_step": "expected ECG: one step per trajectory, averaged",
}


@dataclass(frozen=True)
class Recordings:
    """Whole prepared recordings of one length each: signals [N,S] by id, in the order of `ids`; true R peaks in seconds or None."""

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    signals: tuple[Signals, ...]
    r_peaks: tuple[NDArray[np.float64] | None, ...]


def evaluate(
    pipeline: Path,
    reference: Path,
    out: Path,
    given: Sequence[str] = (),
    train: Path | None = None,
    split: Literal["train", "val", "test"] = "test",
    trajectories: int = 8,
    steps: int | None = None,
    limit: int = 100,
    cache: Path | None = None,
    seed: int = 0,
) -> Path:
    """Error on the leads that were not given, against linear regression; R peaks; the given signals of others as control.

    Writes metrics.json, leads.md (the table) and examples.png (recordings chosen without looking, and the worst).

    Args:
        pipeline: folder of an ECG translation pipeline.
        reference: manifest of recordings that the pipeline never saw (in `split`).
        out: folder to write into.
        given: signals to give (several words); by default what the pipeline was made for.
        train: manifest whose split "train" fits the regressions; by default `reference`.
        split: which split of the reference.
        trajectories: per recording.
        steps: of the sampler; the pipeline's own by default.
        limit: at most so many recordings.
        cache: folder of prepared signals.
        seed: of trajectories and resamples.
    """
    pipe = ECGTranslationPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    names = pipe.autoencoder.names
    given = tuple(given) or tuple(pipe.config.default_given.split(","))
    shown = pipe.autoencoder.given(given).numpy()
    missing = [i for i, name in enumerate(names) if not shown[i] and name != "PPG"]
    if not missing:
        raise EvaluationError(f"{', '.join(given)} given: no lead is missing, so there is nothing to measure")
    held_out = load_recordings(read_manifest(reference, split, record=ECGRecord), names, pipe.preparation, limit, cache)
    training = load_recordings(read_manifest(train or reference, "train", record=ECGRecord), names, pipe.preparation, None, cache)
    if shared := set(held_out.patients) & set(training.patients):
        raise EvaluationError(f"{len(shared)} patients (first: {min(shared)!r}) are in the reference and in the training split")
    if len(held_out.ids) < SMALLEST_SET:
        raise EvaluationError(f"{reference} holds {len(held_out.ids)} usable recordings in {split!r}; {SMALLEST_SET} are needed")

    _say(f"{len(held_out.ids)} recordings, given {', '.join(given)}; regressions from {len(training.ids)} recordings")
    estimates = regressions(training, held_out, shown, missing, pipe.preparation.rate)
    _say(f"generating {trajectories} trajectories of each")
    estimates |= generate(pipe, held_out, shown, missing, trajectories, steps, seed)
    result = measure(held_out, estimates, [names[i] for i in missing], missing, pipe.preparation, seed)
    facts = {
        "pipeline": pipeline.name,
        "reference": reference.parent.name,
        "split": split,
        "recordings": len(held_out.ids),
        "given": list(given),
        "trajectories": trajectories,
        "steps": steps or pipe.config.num_inference_steps,
        "rate_hz": pipe.preparation.rate,
        "seed": seed,
        "methods": METHODS,
        "medgen": __version__,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "leads.md").write_text(table(result))
    draw(held_out, estimates, names, missing, pipe.preparation.rate, out / "examples.png")
    path = out / "metrics.json"
    path.write_text(json.dumps({**facts, **result}, indent=1))
    return path


def load_recordings(
    manifest: Manifest[ECGRecord], names: Sequence[str], preparation: ECGPreparation, limit: int | None, cache: Path | None
) -> Recordings:
    """The (first `limit`) recordings in which all `names` are usable, prepared, cut to whole frames of nothing in particular."""
    data = SignalDataset(manifest, names, preparation, 1.0, cache)
    records = {record.record_id: record for record in manifest.records}
    ids = tuple(data.ids[:limit])
    peaks = (records[i].truth.get("r_peaks") for i in ids)
    return Recordings(
        ids,
        tuple(records[i].patient_id for i in ids),
        tuple(np.asarray(data.records[i]) for i in ids),
        tuple(None if p is None else np.asarray(p, np.float64) for p in peaks),
    )


def regressions(
    training: Recordings, held_out: Recordings, shown: NDArray[np.bool_], missing: Sequence[int], rate: float
) -> dict[str, list[Signals]]:
    """Both linear estimates of the missing leads [M,S] of every held-out recording."""
    reach = round(LAGS_SECONDS * rate)
    models = {"linear": LinearRegression(), "linear_lagged": LinearRegression(reach, max(1, round(rate / 60)))}
    found = {}
    for name, model in models.items():
        model.fit([s[shown] for s in training.signals], [s[missing] for s in training.signals])
        found[name] = [model.predict(s[shown]) for s in held_out.signals]
    return found


def generate(
    pipe: ECGTranslationPipeline,
    held_out: Recordings,
    shown: NDArray[np.bool_],
    missing: Sequence[int],
    trajectories: int,
    steps: int | None,
    seed: int,
) -> dict[str, list[Signals]]:
    """The missing leads [M,S] of every recording: one trajectory, the mean of all, and the expected ECG in one step."""
    found: dict[str, list[Signals]] = {"single": [], "mean": [], "one_step": []}
    for record_id, signals in zip(held_out.ids, held_out.signals, strict=True):
        # what is hidden is overwritten before the pipeline sees it: no mistake in there could leak it
        values = torch.from_numpy(np.where(shown[:, None], signals, np.nan))[None]
        given = torch.from_numpy(shown)[None]
        for count, kind in ((steps, "several"), (1, "one_step")):
            seeds = [generator("ecg translation", seed, record_id, k, kind) for k in range(trajectories)]
            drawn = pipe.translate(values, given, trajectories, count, seeds)[0, :, list(missing)].numpy()
            if kind == "several":
                found["single"].append(drawn[0])
            found["mean" if kind == "several" else kind].append(drawn.mean(0))
    return found


def measure(
    held_out: Recordings,
    estimates: dict[str, list[Signals]],
    names: Sequence[str],
    missing: Sequence[int],
    preparation: ECGPreparation,
    seed: int,
) -> dict[str, Any]:
    """RMSE (mV), its ratio to linear regression's with an interval over patients, correlation and R peaks of every method."""
    truth = [signals[list(missing)] for signals in held_out.signals]
    # the control: the estimate that belongs to another recording
    shuffled = {f"{name}_shuffled": estimates[name][1:] + estimates[name][:1] for name in ("linear", "mean", "single")}
    errors = {name: _squared_errors(found, truth) for name, found in (estimates | shuffled).items()}
    result: dict[str, Any] = {"missing": list(names), "rmse_mv": {}, "ratio_to_linear": {}, "correlation": {}, "r_peaks": {}}
    for name, squared in errors.items():
        result["rmse_mv"][name] = {
            "all": float(np.sqrt(squared.mean())),
            **{lead: float(v) for lead, v in zip(names, np.sqrt(squared.mean(0)))},
        }
        statistic = partial(_ratios, squared, errors["linear"])
        ratios = group_bootstrap(statistic, held_out.patients, seed)
        result["ratio_to_linear"][name] = {
            label: estimate.as_dict() for label, estimate in zip(("all", *names), ratios, strict=True)
        }
    for name, found in (estimates | shuffled).items():
        values = np.array([correlation(one, other) for one, other in zip(found, truth)])
        result["correlation"][name] = {
            "all": float(np.nanmean(values)),
            **{lead: float(v) for lead, v in zip(names, np.nanmean(values, 0))},
        }
    lead = "II" if "II" in names else names[0]
    row = list(names).index(lead)
    result["r_peak_lead"] = lead
    true = [
        _r_peaks(reference[row], preparation) if known is None else known for reference, known in zip(truth, held_out.r_peaks)
    ]
    for name, found in {"recorded": truth, **estimates, **shuffled}.items():
        result["r_peaks"][name] = r_peak_agreement([one[row] for one in found], true, preparation)
    return result


def r_peak_agreement(
    signals: Sequence[NDArray[np.float32]], true: Sequence[NDArray[np.float64]], preparation: ECGPreparation
) -> dict[str, float]:
    """F1 within each tolerance, timing of the matched peaks (ms) and error of the heart rate (bpm) of signals [S]."""
    found = [_r_peaks(signal, preparation) for signal in signals]
    ends = [len(signal) / preparation.rate - EDGE_SECONDS for signal in signals]
    inner = [
        [t[(t > EDGE_SECONDS) & (t < end)] for t in pair] for pair, end in zip(zip(found, true), ends)
    ]  # filters ring at ends
    result: dict[str, float] = {}
    for tolerance in TOLERANCES_MS:
        matches = [match_peaks(a, b, tolerance / 1000) for a, b in inner]
        result[f"f1_{tolerance}ms"] = f1(matches)
    errors = np.concatenate([match.errors for match in matches]) * 1000
    result["timing_bias_ms"] = float(np.median(errors)) if len(errors) else float("nan")
    result["timing_abs_error_ms"] = float(np.median(np.abs(errors))) if len(errors) else float("nan")
    rates = np.array([[_rate(a), _rate(b)] for a, b in inner])
    result["heart_rate_mae_bpm"] = float(np.nanmean(np.abs(rates[:, 0] - rates[:, 1])))
    result["without_rate"] = float(np.isnan(rates[:, 0]).sum())
    return result


def _r_peaks(signal: NDArray[np.float32], preparation: ECGPreparation) -> NDArray[np.float64]:
    return np.asarray(prepare_ecg(ECG(signal[None], ("II",), preparation.rate), preparation).r_peaks, np.float64)


def _rate(peaks: NDArray[np.float64]) -> float:
    return 60 / float(np.mean(np.diff(peaks))) if len(peaks) > 1 else float("nan")


def _squared_errors(found: Sequence[Signals], truth: Sequence[Signals]) -> Floats:
    """Mean squared error [R,M] of every lead of every recording, over the samples that both have."""
    rows = []
    for one, other in zip(found, truth, strict=True):
        length = min(one.shape[1], other.shape[1])
        rows.append(((one[:, :length].astype(np.float64) - other[:, :length]) ** 2).mean(1))
    return np.array(rows)


def _ratios(squared: Floats, baseline: Floats, rows: Indices) -> Floats:
    """RMSE over the baseline's: of all leads together, then of each (NaN where the baseline is exact)."""
    mine, theirs = squared[rows].mean(0), baseline[rows].mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(theirs > 1e-8, np.sqrt(mine / theirs), np.nan)
    return np.concatenate([[np.sqrt(mine.mean() / theirs.mean())], each])


def table(result: dict[str, Any]) -> str:
    """RMSE in mV of every missing lead by method, as Markdown."""
    methods = [name for name in METHODS if name in result["rmse_mv"]]
    lines = ["| lead | " + " | ".join(methods) + " | mean / linear |", "|---" * (len(methods) + 2) + "|"]
    for lead in ("all", *result["missing"]):
        ratio = result["ratio_to_linear"]["mean"][lead]["value"]
        cells = [f"{result['rmse_mv'][name][lead]:.4f}" for name in methods]
        lines.append(f"| {lead} | " + " | ".join(cells) + f" | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def draw(
    held_out: Recordings,
    estimates: dict[str, list[Signals]],
    names: Sequence[str],
    missing: Sequence[int],
    rate: float,
    path: Path,
) -> None:
    """Three evenly spaced recordings and the worst: recorded (black), linear regression (grey), mean (blue), one trajectory (red)."""
    from matplotlib.figure import Figure

    truth = [signals[list(missing)] for signals in held_out.signals]
    worst = int(_squared_errors(estimates["mean"], truth).mean(1).argmax())
    chosen = [*dict.fromkeys([0, len(truth) // 3, 2 * len(truth) // 3, worst])]
    figure = Figure(figsize=(5.2 * len(chosen), 0.95 * len(missing) + 0.6), layout="constrained")
    axes = np.asarray(figure.subplots(len(missing), len(chosen), sharex="col", squeeze=False))
    curves: Sequence[tuple[str, dict[str, Any]]] = (
        ("linear", {"color": "0.6", "linewidth": 1.0}),
        ("single", {"color": "#d1495b", "linewidth": 0.6}),
        ("mean", {"color": "#1f6feb", "linewidth": 1.1}),
    )
    for column, index in enumerate(chosen):
        times = np.arange(truth[index].shape[1]) / rate
        for row, lead in enumerate(missing):
            axis = axes[row, column]
            axis.plot(times, truth[index][row], color="black", linewidth=1.0)
            for name, style in curves:
                axis.plot(times[: estimates[name][index].shape[1]], estimates[name][index][row], **style)
            axis.set_xlim(0, min(5.0, times[-1]))
            axis.tick_params(labelsize=6)
            axis.set_ylabel(names[lead], rotation=0, fontsize=8)
        axes[0, column].set_title(f"{held_out.ids[index]}{' (worst)' if index == worst else ''}", fontsize=8)
    figure.savefig(path, dpi=80)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
