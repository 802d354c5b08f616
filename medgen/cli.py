"""The `medgen` command: a table of verbs, each the function that does the work, imported only when it is called.

`medgen --help` answers without importing torch; a wrong verb or option names the nearest right one; our own errors are one line.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """What a verb is for, and its function ("module:name", or one of this file); options and their help are the function's own."""

    summary: str
    function: str | Callable[..., Any]


def train(task: str, overrides: Sequence[str], config: Path) -> None:
    """Train from a recipe; the same command again resumes. Many processes: `accelerate launch train/<task>.py --config ...`.

    Further words `section.field=value` override any field of the recipe, for example `train.steps=200 train.out=runs/try`.

    Args:
        config: the recipe, one of configs/<task>/*.yaml.
    """
    from medgen.training.run import run

    run(task, config, overrides)


VERBS = {
    "doctor": Verb("what this machine can do, and what each recipe would need", "medgen.doctor:doctor"),
    "demo": Verb("sample, fine-tune, resume and evaluate the shipped pipelines; leaves one page to open", "medgen.demo.run:demo"),
    "digital chest": Verb(
        "make digital chest patients: films, reports, masks, numeric truth", "medgen.digital.chest:write_dataset"
    ),
    "digital echo": Verb("make digital hearts: echo clips and the ECGs that drove them", "medgen.digital.echo:write_dataset"),
    "digital ecg": Verb(
        "make digital recordings: 12-lead ECGs with their pulse waves", "medgen.digital.recordings:write_dataset"
    ),
    "digital progression": Verb(
        "make digital follow-ups: visits over days to years, treatments, truth, simulated futures",
        "medgen.digital.progression:write_dataset",
    ),
    "data build": Verb("make a manifest from a public data set's folder", "medgen.data.build:build"),
    "data check": Verb("check a manifest and every image or clip it names", "medgen.data.build:check"),
    "data deduplicate": Verb("a manifest without films that are another one's copy", "medgen.data.duplicates:deduplicate"),
    "data join": Verb("give echo clips the ECGs nearest in time of the same patient", "medgen.data.echo_join:join"),
    "data shards": Verb(
        "encode a recipe's training data into shards that stream", "medgen.tasks.text_to_cxr:write_training_shards"
    ),
    "train autoencoder": Verb("train a KL autoencoder on a manifest's images", train),
    "train echo-tokens": Verb("train the masked-token ECG-to-echo generator on a video tokenizer's codes", train),
    "train video-tokenizer": Verb("train a video tokenizer (codes for masked-token generation) on echo clips", train),
    "train text-encoder": Verb("train a small text encoder with its own tokenizer", train),
    "train classifier": Verb("train a finding classifier (judge and feature encoder)", train),
    "train image-classifier": Verb("train a torchvision classifier of findings on real, synthetic or mixed films", train),
    "train ejection-fraction": Verb("train an R(2+1)D regressor of the ejection fraction on echo clips", train),
    "train re-identification": Verb("train the network that tells whether two films show one patient", train),
    "train segmenter": Verb("train an echo video segmenter (judge of generated videos)", train),
    "train text-to-cxr": Verb("train a text-to-chest-X-ray pipeline, or fine-tune a published one", train),
    "train progression": Verb("train a forecaster of the next visits (or its deterministic baseline)", train),
    "train film-meter": Verb("train the judge that reads millilitres and ratios off films", train),
    "train ecg-translation": Verb("train missing ECG leads from some leads, or an ECG from a pulse wave", train),
    "train ecg-to-echo": Verb("train a generator of echo clips that follow an ECG", train),
    "sample text-to-cxr": Verb(
        "sample chest X-rays from text, with seeds, shards and provenance", "medgen.sampling.text_to_cxr:sample"
    ),
    "sample ecg-to-echo": Verb(
        "sample echo videos from ECGs: MP4 with the ECG strip, lossless frames, provenance", "medgen.sampling.ecg_to_echo:sample"
    ),
    "sample progression": Verb(
        "sample a patient's next visits at any dates, many futures each: films or volumes, strips, provenance",
        "medgen.sampling.progression:sample",
    ),
    "sample severity": Verb(
        "edit a film towards a severity in rounds (no time in it): stages, ROI, strips", "medgen.sampling.severity:sample"
    ),
    "evaluate text-to-cxr": Verb(
        "measure generated images against real ones and their prompts", "medgen.evaluation.text_to_cxr:evaluate"
    ),
    "evaluate cases": Verb(
        "write the standard evaluation prompts of a held-out manifest", "medgen.evaluation.cases:write_alignment_cases"
    ),
    "evaluate ecg-to-echo": Verb(
        "measure generated echo videos against their ECGs, their conditions and real ones",
        "medgen.evaluation.echo.evaluate:evaluate",
    ),
    "evaluate echo-cases": Verb(
        "write the standard echo evaluation cases of a held-out manifest", "medgen.evaluation.echo.cases:write_echo_cases"
    ),
    "evaluate progression": Verb(
        "measure forecasts against the true follow-ups, simulated futures and every baseline",
        "medgen.evaluation.progression.evaluate:evaluate",
    ),
    "evaluate progression-cases": Verb(
        "write the standard forecasting cases of a held-out manifest",
        "medgen.evaluation.progression.cases:write_progression_cases",
    ),
    "evaluate severity-cases": Verb(
        "write severity-editing cases of digital patients, with regions of interest",
        "medgen.evaluation.severity_cases:write_severity_cases",
    ),
    "evaluate severity": Verb("measure severity edits: outside the ROI, monotone inside", "medgen.evaluation.severity:evaluate"),
    "evaluate ecg-translation": Verb(
        "measure generated ECG leads against linear regression on held-out recordings",
        "medgen.evaluation.ecg_translation:evaluate",
    ),
    "evaluate autoencoder": Verb(
        "PSNR and SSIM of reconstructions on held-out images", "medgen.evaluation.autoencoder:evaluate_autoencoder"
    ),
    "augment plan": Verb(
        "plan synthetic films or clips: which findings, groups or ejection fractions a training set lacks",
        "medgen.augmentation.plan:plan",
    ),
    "augment generate": Verb(
        "sample a plan through quality and privacy gates; writes a manifest to train on", "medgen.augmentation.generate:generate"
    ),
    "augment collect": Verb(
        "a manifest of sampled echo clips to train on: the asked ejection fraction is the label",
        "medgen.augmentation.clip_generate:collect",
    ),
    "augment train": Verb(
        "train networks on real, synthetic and mixed films or clips, at shares of the real data and over seeds",
        "medgen.augmentation.experiment:train",
    ),
    "augment report": Verb(
        "what synthesis gained or cost: intervals, paired differences, subgroup gaps, one page",
        "medgen.augmentation.report:report",
    ),
    "augment text-probe": Verb(
        "what fine-tuning taught a text encoder: linear probes before and after", "medgen.augmentation.text_probe:text_probe"
    ),
    "audit": Verb(
        "privacy audit of a pipeline: copies, re-identification, membership, extraction, text noise; one report",
        "medgen.evaluation.privacy.audit:audit",
    ),
    "audit gate": Verb(
        "build a privacy gate for the sampler, validated with planted copies", "medgen.evaluation.privacy.gate:build_gate"
    ),
    "audit leaky-patients": Verb(
        "make the digital patients of the leaky fixture: members, and others who were never seen",
        "medgen.evaluation.privacy.leaky:write_leaky_patients",
    ),
    "memcontrol search": Verb(
        "search which parts to fine-tune: memorisation against quality, resumable", "medgen.memcontrol.search:search"
    ),
    "memcontrol train": Verb("fine-tune with a mask that a search found", "medgen.memcontrol.train:train"),
    "memcontrol private": Verb(
        "fine-tune LoRA with differential privacy, a patient the unit; says what epsilon was spent",
        "medgen.memcontrol.dp:train_private",
    ),
    "memcontrol report": Verb("the Pareto front of a search with its baselines", "medgen.memcontrol.report:report"),
    "study plan": Verb(
        "power and sample size of a reader study, by simulation; says when a plan cannot support its claim",
        "medgen.study.plan:plan",
    ),
    "study sample": Verb(
        "sample everything that a study's protocol asks for, sharded and resumable", "medgen.study.sampling:sample"
    ),
    "study build": Verb(
        "make a blinded pack for readers, its key outside: one page that opens from disk", "medgen.study.build:build"
    ),
    "study serve": Verb(
        "the same page from a small server: readers log in by token, answers survive a kill", "medgen.study.serve:serve"
    ),
    "study simulate": Verb("answers of simulated readers of known skill, to try a study out", "medgen.study.simulated:simulate"),
    "study analyze": Verb("analyse readers' answers with the key: one report", "medgen.study.analyze:analyze"),
    "export dicom": Verb(
        "release samples as DICOM: films, echo clips, ECGs, volumes, every redundant mark of being synthetic",
        "medgen.export.dicom:export",
    ),
    "export nifti": Verb("release volumes as NIfTI with a BIDS derivative's sidecars", "medgen.export.nifti:export"),
    "export mp4": Verb("release clips as MP4, visibly marked synthetic", "medgen.export.mp4:export"),
    "export wfdb": Verb("release ECGs as WFDB records that say they are synthetic", "medgen.export.wfdb:export"),
    "export hf": Verb("release samples as a Hugging Face dataset folder: card, Croissant, checksums", "medgen.export.hf:export"),
    "bench train": Verb("time a training step against a plain loop", "medgen.bench.train:bench_train"),
    "bench load": Verb("time the loader against uncached transforms", "medgen.bench.load:bench_load"),
    "bench sample": Verb("time sampling per image", "medgen.bench.sample:bench_sample"),
    "bench generators": Verb(
        "echo generators side by side: seconds per clip, evaluations, parameters, quality",
        "medgen.bench.generators:bench_generators",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code: 0 done, 1 a bug (with traceback), 2 a mistake in what was asked, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["--version"]:
        from medgen import __version__

        print(f"medgen {__version__}")
        return 0
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in VERBS), None)
    if name is None:
        return _no_such_verb([word for word in words if word not in ("-h", "--help")])
    try:
        return _call(name, words[len(name.split()) :])
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `medgen ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        expected = _is_the_callers_mistake(error)
        if debug or not expected:
            traceback.print_exc()
        else:
            print(f"error: {error}\n(--debug shows where)", file=sys.stderr)
        return 2 if expected else 1


def _call(name: str, words: list[str]) -> int:
    import tyro

    function = VERBS[name].function
    if isinstance(function, str):
        module, _, attribute = function.partition(":")
        function = getattr(importlib.import_module(module), attribute)
    elif function is train:
        overrides = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
        words = [word for word in words if word not in overrides]
        function = partial(train, name.split()[1], overrides)
    result = tyro.cli(function, prog=f"medgen {name}", args=words, config=(tyro.conf.FlagCreatePairsOff,))
    if isinstance(result, int):
        return result
    if result is not None:
        print(result)
    return 0


def _is_the_callers_mistake(error: Exception) -> bool:
    """A file that is not there, or an error that medgen raised on purpose; anything else is a bug and shows its traceback."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    raised_in = "" if innermost is None else str(innermost.tb_frame.f_globals.get("__name__", ""))
    return isinstance(error, ValueError | RuntimeError | MemoryError) and raised_in.split(".")[0] == "medgen"


def _no_such_verb(words: list[str]) -> int:
    """The overview for `medgen` and `medgen train`; otherwise the nearest verb and exit code 2."""
    below = {name: verb for name, verb in VERBS.items() if words and name.split()[0] == words[0]}
    if not words or (below and len(words) == 1):
        print(_overview(below or VERBS))
        return 0
    asked = " ".join(words[:2])
    first = dict.fromkeys(name.split()[0] for name in VERBS)
    near = difflib.get_close_matches(asked, VERBS, 1, 0.6) or difflib.get_close_matches(words[0], first, 1, 0.5)
    hint = f"did you mean `medgen {near[0]}`?" if near else "`medgen --help` lists what there is"
    print(f"error: there is no `medgen {asked}`; {hint}", file=sys.stderr)
    return 2


def _overview(verbs: dict[str, Verb]) -> str:
    width = max(map(len, verbs)) + 2
    return "\n".join(
        [
            "medgen: latent diffusion for medicine. Text to chest X-ray, disease progression, ECG to echocardiogram.",
            "",
            "usage: medgen VERB [--options] [section.field=value ...]",
            "",
            *(f"  {name:<{width}}{verb.summary}" for name, verb in verbs.items()),
            "",
            "`medgen VERB --help` shows a verb's options, --debug shows tracebacks, --version the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
