"""`medgen augment text-probe`: how much of a report's findings a linear probe reads out of a text encoder, before and after fine-tuning.

Tokens are averaged (padding left out) and one logistic regression per finding is fitted on the reports of the training patients; what
it says of other patients' reports is compared, encoder against encoder, on the same resampled patients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoModel, PreTrainedModel

from medgen.augmentation import plots
from medgen.augmentation.claims import points, signed
from medgen.augmentation.measures import Floats, Spread, auroc, resampled, spread
from medgen.augmentation.predictions import Bools, Films
from medgen.augmentation.report import estimate
from medgen.config import ConfigError
from medgen.data.records import FINDINGS, CXRRecord, Manifest, read_manifest
from medgen.data.report_labels import label_text
from medgen.models.classifier import OUTPUTS, finding_targets
from medgen.models.conditioners import TextConditioner, TextEncoderConfig
from medgen.models.folders import component
from medgen.seeds import stable_seed

RANDOM = "random"


@dataclass(frozen=True)
class Probed:
    """AUROC of one finding (or finding on a side) on reports of other patients, with its intervals, and after minus before."""

    finding: str
    present: int
    absent: int
    before: Spread
    after: Spread
    gain: Spread


@dataclass(frozen=True)
class TextProbe:
    """What the probes read; `macro` is the mean over findings, `sides` over findings on a side (left, right), which words alone do
    not tell apart where two findings are on different sides. `texts`: reports by what they were for."""

    before: str
    after: str
    width: int
    macro: Probed
    sides: Probed | None
    findings: tuple[Probed, ...]
    left_out: tuple[str, ...]
    texts: dict[str, int]
    patients: dict[str, int]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class _Texts:
    """Reports of one split, each once per patient: texts, patients [N], truth and known [N,len(OUTPUTS)]."""

    texts: list[str]
    patients: NDArray[np.str_]
    truth: Bools
    known: Bools


def text_probe(
    before: str,
    after: str,
    manifest: Path,
    out: Path,
    train_reports: int = 300,
    test_reports: int = 1000,
    resamples: int = 500,
    seed: int = 0,
) -> Path:
    """Probe two text encoders on the reports of a manifest; return OUT/index.html, beside which OUT/text_probe.json lies.

    Args:
        before: pipeline or transformers folder of the encoder before fine-tuning, or the word `random`: the architecture of
            `after` with random weights.
        after: pipeline or transformers folder of the encoder after fine-tuning. Both read with their own tokenizer.
        manifest: films with reports; probes learn from its split train and are tested on its split test.
        out: folder for the report.
        train_reports: at most so many reports to learn from. Few show best what an encoder has sorted already.
        test_reports: at most so many reports to test on.
        resamples: how often test patients are drawn anew for the intervals.
        seed: of weights, of the reports chosen and of the resamples.
    """
    whole = read_manifest(manifest)
    parts = {"train": _texts(whole, "train", train_reports, seed), "test": _texts(whole, "test", test_reports, seed)}
    shared = set(parts["train"].patients) & set(parts["test"].patients)
    if shared:
        raise ConfigError(f"{manifest}: patients in train and test: {', '.join(sorted(shared)[:5])}")
    encoders = {"after": load_encoder(after)}
    encoders["before"] = randomly(after, seed) if before == RANDOM else load_encoder(before)
    pooled = {name: {part: pool(encoder, texts.texts) for part, texts in parts.items()} for name, encoder in encoders.items()}
    result = compare(pooled, parts["train"], parts["test"], (_name(before), _name(after)), resamples, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "text_probe.json").write_text(json.dumps(asdict(result), indent=1))
    page = out / "index.html"
    page.write_text(render(result), encoding="utf-8")
    return page


def _name(where: str) -> str:
    """No machine's paths in a report."""
    return "random weights" if where == RANDOM else Path(where).name


def load_encoder(where: str) -> TextConditioner:
    """The encoder at `where`, reading as many tokens as it can (at most 256). Raises `ConfigError` if there is none."""
    conditioner = TextConditioner.from_config(TextEncoderConfig(path=where, max_tokens=16))
    limit = getattr(conditioner.encoder.config, "max_position_embeddings", None) or 256
    return TextConditioner(conditioner.tokenizer, conditioner.encoder, min(int(limit), 256))


def randomly(where: str, seed: int) -> TextConditioner:
    """The architecture and tokenizer at `where` with weights as at the start of training."""
    there = load_encoder(where)
    kind: type[PreTrainedModel] = type(there.encoder)
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed("text probe", seed))
        if kind.__module__.startswith("medgen"):
            fresh = kind(there.encoder.config)
        else:
            fresh = AutoModel.from_config(AutoConfig.from_pretrained(component(where, "text_encoder")))
    return TextConditioner(there.tokenizer, fresh.float().eval().requires_grad_(False), there.max_tokens)


@torch.no_grad()
def pool(conditioner: TextConditioner, texts: Sequence[str], batch: int = 64) -> Floats:
    """Mean of the tokens of each text, [N,D]. Texts are read in order of length, so that little is padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = np.zeros((len(texts), conditioner.width))
    for start in range(0, len(texts), batch):
        chosen = order[start : start + batch]
        tokens, mask = conditioner.encode([texts[i] for i in chosen])
        inside = mask[..., None].to(tokens.dtype)
        rows[chosen] = ((tokens * inside).sum(1) / inside.sum(1).clamp(min=1)).double().cpu().numpy()
    return rows


def compare(
    pooled: dict[str, dict[str, Floats]], train: _Texts, test: _Texts, names: tuple[str, str], resamples: int, seed: int
) -> TextProbe:
    """Fit and test the probes of both encoders; `pooled` [N,D] by encoder and part."""
    weights = resampled(Films((), test.patients, test.truth, test.known), resamples, seed)
    patients = {name: len(set(part.patients)) for name, part in (("train", train), ("test", test))}
    tables: dict[str, list[Floats]] = {"before": [], "after": []}
    found, left_out = [], []
    for f, finding in enumerate(OUTPUTS):
        learn, rows = train.known[:, f], test.known[:, f]
        if min(len(set(train.truth[learn, f].tolist())), len(set(test.truth[rows, f].tolist()))) < 2:
            left_out.append(finding)
            continue
        for name, table in tables.items():
            scores = _probe(pooled[name]["train"][learn], train.truth[learn, f], pooled[name]["test"][rows])
            table.append(auroc(test.truth[rows, f], scores, weights[:, rows]))
        before, after = tables["before"][-1], tables["after"][-1]
        present = int(test.truth[rows, f].sum())
        found.append(_probed(finding, present, int(rows.sum()) - present, before, after, patients["test"]))
    means = {what: _mean(what, tables, [one.finding for one in found], patients["test"]) for what in ("findings", "sides")}
    macro, sides = means["findings"], means["sides"]
    if macro is None:
        raise ConfigError("no finding is both present and absent in the training and the test reports: nothing to probe")
    texts = {"train": len(train.texts), "test": len(test.texts)}
    width = pooled["after"]["train"].shape[1]
    told = tuple(_sentence(one, names) for one in (macro, sides) if one is not None)
    return TextProbe(names[0], names[1], width, macro, sides, tuple(found), tuple(left_out), texts, patients, told)


def _probe(features: Floats, truth: Bools, others: Floats) -> Floats:
    """Logits of logistic regression (L2, C = 1, standardised features) for `others`."""
    scale = StandardScaler().fit(features)
    model = LogisticRegression(max_iter=2000).fit(scale.transform(features), truth)
    return np.asarray(model.decision_function(scale.transform(others)), dtype=np.float64)


def _mean(what: str, tables: dict[str, list[Floats]], names: Sequence[str], patients: int) -> Probed | None:
    """Mean over findings, or over findings on a side; None without any."""
    chosen = [i for i, name in enumerate(names) if (name in FINDINGS) == (what == "findings")]
    if not chosen:
        return None
    before, after = (np.nanmean(np.stack([tables[name][i] for i in chosen]), axis=0) for name in ("before", "after"))
    return _probed(f"mean of {what}", 0, 0, before, after, patients)


def _probed(finding: str, present: int, absent: int, before: Floats, after: Floats, patients: int) -> Probed:
    first, second = (spread(values[None], patients, (0.0, 1.0)) for values in (before, after))
    return Probed(finding, present, absent, first, second, spread((after - before)[None], patients))


def _sentence(one: Probed, names: tuple[str, str]) -> str:
    gain, what = one.gain, one.finding.removeprefix("mean of ")
    told = f"{what.capitalize()}: {names[1]} minus {names[0]} = {points(gain)}".replace(", 1 seed", "")
    if gain.low > 0:
        return f"{told} of mean AUROC: a linear probe reads more of them from {names[1]}."
    if gain.high < 0:
        return f"{told} of mean AUROC: a linear probe reads less of them from {names[1]}."
    return f"{told} of mean AUROC. No difference is shown, which is not evidence that there is none."


def _texts(manifest: Manifest[CXRRecord], split: str, most: int, seed: int) -> _Texts:
    """The reports of a split: each text once per patient (two films of a study share it), at most `most`."""
    chosen: dict[tuple[str, str], CXRRecord] = {}
    for record in manifest.records:
        text = " ".join(part for part in (record.findings, record.impression) if part)
        if record.split == split and text:
            chosen.setdefault((record.patient_id, text), record)
    if not chosen:
        raise ConfigError(f"{manifest.name}: no reports in the split {split!r}")
    keys = sorted(chosen, key=lambda key: stable_seed("text probe", seed, *key))[:most]
    targets, mask = zip(*(finding_targets(chosen[key].labels or label_text(key[1])) for key in keys), strict=True)
    truth, known = (torch.stack(rows).numpy().astype(bool) for rows in (targets, mask))
    return _Texts([text for _, text in keys], np.array([who for who, _ in keys]), truth, known)


def render(result: TextProbe) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("medgen.augmentation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "estimate": estimate,
        "points": points,
        "signed": signed,
        "words": lambda name: name.replace("_", " "),
    }
    rows = [(one.finding.replace("_", " "), one.gain, plots.COLOURS[0]) for one in result.findings]
    rows += [(one.finding, one.gain, plots.INK) for one in (result.macro, result.sides) if one is not None]
    forest = Markup(plots.differences(rows, "points of AUROC, after minus before (95 % interval)"))
    return environment.get_template("text_probe.html.j2").render(r=result, forest=forest)
