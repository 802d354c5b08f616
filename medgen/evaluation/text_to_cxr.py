"""`medgen evaluate text-to-cxr`: generated chest X-rays against held-out real ones and against their own prompts."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

from medgen import __version__
from medgen.data.records import FINDINGS, Manifest, read_manifest
from medgen.evaluation import alignment, plots, report
from medgen.evaluation.diversity import diversity
from medgen.evaluation.features import FeatureEncoder, extract, load_encoder, load_judge, pixel_encoder
from medgen.evaluation.fidelity import SMALLEST_SET, compare
from medgen.evaluation.images import EvaluationError, ImageSet, read_generated, reference_set
from medgen.evaluation.memorisation import Memorisation, memorisation
from medgen.evaluation.subgroups import frechet_by_finding, subgroup_coverage

FRONTAL = ("PA", "AP", "UNKNOWN")
TRUSTED_AUROC = 0.9  # of the judge on real images


def evaluate(
    generated: Path,
    reference: Path,
    out: Path,
    encoder: str = "digital-chest",
    classifier: Path | None = None,
    train: Path | None = None,
    split: Literal["train", "val", "test", "all"] = "test",
    seed: int = 0,
    replicates: int = 100,
    no_real_images: bool = False,
) -> Path:
    """Measure generated chest X-rays: fidelity, alignment with their prompts, diversity, copies. Writes metrics.json and report.html.

    Args:
        generated: folder that `medgen sample text-to-cxr` wrote (images and metadata.jsonl).
        reference: manifest of real patients that the generator never saw.
        out: folder for metrics.json, report.html and the feature cache.
        encoder: digital-chest, rad-dino[:FOLDER], xrv:FILE, inception:FILE, or a model folder.
        classifier: folder of another judge than the shipped one.
        train: manifest that the generator was trained on: switches on the search for copies (its split "train").
        split: which split of the reference; "all" where the whole manifest was held out.
        seed: of splits, subsets and resamples.
        replicates: random halvings for the intervals of population measures.
        no_real_images: leave every image of a real patient out of report.html, which may then leave the place of the data.
    """
    images = read_generated(generated)
    if len(images) < SMALLEST_SET:
        raise EvaluationError(f"{generated} holds {len(images)} images; at least {SMALLEST_SET} are needed to say anything")
    manifest = read_manifest(reference, None if split == "all" else split)
    real = reference_set(manifest, images.native, FRONTAL)
    features, judge = load_encoder(encoder), load_judge(classifier)
    out.mkdir(parents=True, exist_ok=True)
    cache = out / "features"

    _say(f"encoding {len(images)} generated and {len(real)} reference images with {features.name}")
    fake_features, real_features = extract(images, features, cache), extract(real, features, cache)
    scorer = alignment.judge_encoder(judge)
    logits, real_logits = extract(images, scorer, cache), extract(real, scorer, cache)

    drawn = population(images)
    _say(f"comparing populations ({len(drawn)} generated images of prompts as they occur)")
    fidelity = compare(
        features.name.partition(":")[0],
        real_features,
        real.groups,
        fake_features[drawn],
        [images.groups[i] for i in drawn],
        seed,
        replicates=replicates,
    )
    _say("reading prompts and judging images")
    targets, known = alignment.prompt_targets([str(line["prompt"]) for line in images.metadata])
    pairs, thresholds = alignment.find_pairs(images), judge.thresholds.tolist()
    train_set, copies = _search_copies(images, real, fake_features, real_features, features, train, manifest, cache, seed)
    real_targets, real_known = alignment.label_targets(real)
    ceiling = alignment.finding_auroc(real_logits, real_targets, real_known, real.groups, seed)
    single = [i for i, line in enumerate(images.metadata) if line.get("pair_id") is None]
    count = len(FINDINGS)
    evaluation = report.Evaluation(
        facts=_facts(images, real, manifest, features, judge.config.get("patients", ""), scorer.fingerprint, seed, split),
        fidelity=fidelity,
        by_finding=frechet_by_finding(
            fidelity.encoder,
            real_features,
            (real_targets & real_known)[:, :count],
            real.groups,
            fake_features[single],
            (targets & known)[single, :count],
            [images.groups[i] for i in single],
            seed,
            min(replicates, 30),
        ),
        subgroups=subgroup_coverage([line["record"] for line in real.metadata], real_features, fake_features[drawn], seed),
        findings=alignment.finding_auroc(logits, targets, known, _prompt_groups(images), seed),
        ceiling=ceiling,
        laterality=alignment.score_pairs("laterality", pairs, logits, thresholds),
        negation=alignment.score_pairs("negation", pairs, logits, thresholds),
        diversity=diversity(images, real, images.native or features.size, seed),
        memorisation=copies,
        warnings=_warnings(images, pairs, ceiling),
    )
    material = report.Material(images, real, train_set, logits, targets, known, thresholds, pairs, fake_features, real_features)
    _say("writing the report")
    _write(out / "metrics.json", json.dumps(plain(evaluation), indent=1))
    page = out / "report.html"
    _write(page, report.render(evaluation, material, real_images=not no_real_images))
    return page


def population(images: ImageSet) -> list[int]:
    """Images to compare with the real population: one of every case whose purpose is "population".

    Prompts that were chosen for their findings would shift the population. Without such cases: one image of every single case, and
    every image where that leaves too few.
    """
    first = [i for i, line in enumerate(images.metadata) if not line.get("trajectory")]
    marked = [i for i in first if images.metadata[i].get("purpose") == "population"]
    single = [i for i in first if images.metadata[i].get("pair_id") is None]
    return next((chosen for chosen in (marked, single) if len(chosen) >= SMALLEST_SET), list(range(len(images))))


def _search_copies(
    images: ImageSet,
    real: ImageSet,
    fake_features: Any,
    real_features: Any,
    encoder: FeatureEncoder,
    train: Path | None,
    manifest: Manifest,
    cache: Path,
    seed: int,
) -> tuple[ImageSet | None, tuple[Memorisation, ...]]:
    """Nearest training neighbours in the encoder's features and in pixels; nothing without a training manifest."""
    if train is None:
        return None, ()
    training = read_manifest(train, "train")
    shared = {r.patient_id for r in training.records} & {r.patient_id for r in manifest.records}
    if shared:
        raise EvaluationError(
            f"{len(shared)} patients (first: {min(shared)!r}) are in the reference and in the training manifest: the reference was "
            "not held out"
        )
    train_set = reference_set(training, images.native, FRONTAL)
    _say(f"searching {len(train_set)} training images for copies")
    groups, pixels = list(images.groups), pixel_encoder()
    fake_pixels, train_pixels, real_pixels = (extract(part, pixels, cache) for part in (images, train_set, real))
    arrays = [
        ("features", fake_features, extract(train_set, encoder, cache), real_features),
        ("pixels", fake_pixels, train_pixels, real_pixels),
    ]
    return train_set, tuple(memorisation(space, fake, groups, near, far, seed) for space, fake, near, far in arrays)


def _prompt_groups(images: ImageSet) -> list[str]:
    """Images that share a prompt or a pair belong together when cases are resampled."""
    return [str(line.get("pair_id") or line["case_id"]) for line in images.metadata]


def _facts(
    images: ImageSet,
    real: ImageSet,
    manifest: Manifest,
    encoder: FeatureEncoder,
    judge: str,
    judge_hash: str,
    seed: int,
    split: str,
) -> dict[str, Any]:
    return {
        "generated": images.name,
        "images": len(images),
        "cases": len(set(images.groups)),
        "models": sorted({str(line.get("model", "unknown model")) for line in images.metadata}),
        "image_size": images.native,
        "reference": manifest.name,
        "reference_split": split,
        "reference_images": len(real),
        "reference_patients": len(set(real.groups)),
        "reference_manifest": manifest.sha256,
        "encoder": encoder.name.partition(":")[0],
        "encoder_fingerprint": encoder.fingerprint,
        "judge_learned_from": judge or "unknown",
        "judge_fingerprint": judge_hash,
        "seed": seed,
        "medgen": __version__,
    }


def _warnings(images: ImageSet, pairs: list[alignment.Pair], ceiling: alignment.FindingAUROC) -> tuple[str, ...]:
    kinds = {pair.kind for pair in pairs}
    missing = [kind for kind in ("laterality", "negation") if kind not in kinds]
    warnings = []
    if missing:
        warnings.append(
            f"No {' and no '.join(missing)} pairs among these images, so that was not tested; `medgen evaluate cases` writes prompts "
            "that hold them."
        )
    measured = [output for output in ceiling.outputs[: len(FINDINGS)] if output.auroc is not None]
    unsure = [f"{plots.words(o.name)} ({o.auroc.value:.2f})" for o in measured if o.auroc and o.auroc.value < TRUSTED_AUROC]
    if unsure:
        warnings.append(
            f"The judge itself is unsure of {', '.join(unsure)} on real images (AUROC in brackets): what it says of these in generated "
            "images is weak evidence, for or against."
        )
    if not all(line.get("synthetic") for line in images.metadata):
        warnings.append("Not every line of metadata.jsonl says that its image is synthetic.")
    return tuple(warnings)


def plain(value: Any) -> Any:
    """`value` as JSON holds it: dataclasses as objects, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
