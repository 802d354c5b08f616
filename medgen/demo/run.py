"""`medgen demo`: the whole story on the shipped pipeline, in minutes on two cores: sample, train, be killed, resume, measure.

Every step is the command or the function that a user would call; the same command again continues where it stopped.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medgen import __version__
from medgen.data.records import CXRRecord, Manifest, read_manifest
from medgen.demo.commands import commands
from medgen.demo.echo import follow_ecg
from medgen.demo.measuring import measure
from medgen.demo.page import change, marked, overlay, picture, write_page
from medgen.demo.progression import forecast
from medgen.demo.session import QUICK, Session, Sizes, duration, read_grey, read_lines, words
from medgen.demo.study import read_blinded
from medgen.demo.training import train_and_resume
from medgen.digital.chest import write_dataset
from medgen.doctor import device_name
from medgen.evaluation.features import load_judge
from medgen.sampling.source import find_pipeline
from medgen.sampling.text_to_cxr import sample

PROMPTS = {
    "normal": "Normal chest radiograph.",
    "effusion-left": "Large left pleural effusion.",
    "effusion-right": "Large right pleural effusion.",
    "effusion-none": "No pleural effusion.",
    "heart-mild": "Mild cardiomegaly.",
    "heart-severe": "Severe cardiomegaly.",
    "pneumothorax-right": "Large right pneumothorax.",
    "pneumothorax-none": "No pneumothorax.",
    "edema": "Severe pulmonary edema.",
    "consolidation": "Severe consolidation in the right upper lobe.",
    "nodule": "28 mm nodule in the left upper lobe.",
    "hyperinflation": "Severe hyperinflation of the lungs with flattened diaphragms.",
}
"""Case id → prompt, all from one seed: side, size, finding and negation change, nothing else."""
_ASKED = {
    "effusion-left": ("pleural_effusion_left", "pleural_effusion_right"),
    "effusion-right": ("pleural_effusion_right", "pleural_effusion_left"),
    "effusion-none": ("pleural_effusion",), "heart-mild": ("cardiomegaly",), "heart-severe": ("cardiomegaly",),
    "pneumothorax-right": ("pneumothorax_right", "pneumothorax_left"), "pneumothorax-none": ("pneumothorax",), "edema": ("edema",),
    "consolidation": ("consolidation_right", "consolidation_left"), "nodule": ("nodule_left", "nodule_right"),
    "hyperinflation": ("hyperinflation",), "normal": ("pleural_effusion", "cardiomegaly"),
}  # fmt: skip
"""Case id → what the classifier is asked under the film, the prompt's own finding first."""


def demo(
    out: Path = Path("out/demo"),
    pipeline: str = "digital_chest",
    echo_pipeline: str = "digital_echo",
    progression_pipeline: str = "digital_progression",
    quick: bool = False,
) -> None:
    """Sample, fine-tune, survive a kill, and evaluate the shipped pipelines; leaves OUT/index.html, one page to open.

    Args:
        out: folder of everything the demo writes.
        pipeline: a shipped pipeline's name or a pipeline folder of the digital chest.
        echo_pipeline: the same of the digital heart.
        progression_pipeline: the same of the digital follow-ups.
        quick: fewer films and steps, for tests.
    """
    start = time.monotonic()
    session = Session(out, find_pipeline(pipeline), QUICK if quick else Sizes(), echo_pipeline, progression_pipeline)
    out.mkdir(parents=True, exist_ok=True)
    films, lines = sample_prompts(session)
    patients, manifest = make_patients(session)
    training = train_and_resume(session, manifest)
    evaluation, drawn = measure(session, manifest)
    echo = follow_ecg(session)
    progression = forecast(session)
    study = read_blinded(session, manifest)
    now = datetime.datetime.now().astimezone()
    content = {
        "command": "make demo" if os.environ.get("MAKELEVEL") else "medgen demo",
        "duration": duration(sum(step["seconds"] for step in session.steps)),
        "facts": facts(lines[0], len(films) + drawn, len(echo["clips"]), progression["futures"]),
        "films": films,
        "patients": patients,
        "training": training,
        "evaluation": evaluation,
        "echo": echo,
        "progression": progression,
        "study": study,
        "code": commands(session),
        "provenance": json.dumps(lines[1], indent=1, ensure_ascii=False),
        "steps": session.steps,
        "version": __version__,
        "date": f"{now.day} {now:%B %Y, %H:%M}",
    }
    write_page(out / "index.html", content)
    session.console.print(f"\nDone in {duration(time.monotonic() - start)}. Open this page:")
    print((out / "index.html").resolve())


def facts(line: Mapping[str, Any], drawn: int, clips: int, futures: int) -> list[tuple[str, str]]:
    """What the page's head says: the machine, and from one line of metadata the model and its settings."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return [
        ("this machine", device_name(device)),
        ("model", line["model"]),
        ("weights", line["model_sha256"][:12]),
        ("films drawn", str(drawn)),
        ("clips filmed", str(clips)),
        ("futures drawn", str(futures)),
        ("steps, guidance", f"{line['num_inference_steps']}, {line['guidance_scale']:g}"),
        ("sampler", line["scheduler"].removesuffix("Scheduler").removesuffix("Discrete")),
    ]


def sample_prompts(session: Session) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One seed under every prompt of `PROMPTS`: the page's films with the judge's scores, and their metadata lines."""
    with session.step("one patient-seed under a dozen prompts", "prompts") as folder:
        cases = session.out / "prompts.jsonl"
        cases.write_text("".join(json.dumps({"case_id": k, "prompt": v, "seed": 7, "n": 1}) + "\n" for k, v in PROMPTS.items()))
        sample(session.name, folder, cases=str(cases), steps=session.sizes.sampling_steps)
        lines = {line["case_id"]: line for line in read_lines(folder / "metadata.jsonl")}
        grey = {case_id: read_grey(folder / line["file_name"]) for case_id, line in lines.items()}
        scores = judge(grey)
    return [film(case_id, grey, scores[case_id]) for case_id in PROMPTS], [lines[case_id] for case_id in PROMPTS]


def film(case_id: str, grey: Mapping[str, np.ndarray], scores: Mapping[str, float]) -> dict[str, Any]:
    """One film of the page: picture, difference from the normal one, and what the judge says about what was asked."""
    asked, normal = _ASKED[case_id], case_id == "normal"
    return {
        "prompt": PROMPTS[case_id],
        "marked": marked(PROMPTS[case_id]),
        "image": picture(grey[case_id]),
        "change": None if normal else change(grey[case_id], grey["normal"]),
        "scores": [(words(name.removeprefix("pleural_")), scores[name], name == asked[0] and not normal) for name in asked],
    }


def make_patients(session: Session) -> tuple[list[dict[str, Any]], Path]:
    """Render digital patients that no shipped model has seen; the page's four, and the manifest."""
    with session.step("digital patients with known truth", "patients") as folder:
        path = folder / "manifest.parquet"
        if not path.exists():
            write_dataset(folder, session.sizes.films, seed=20_260, size=session.preprocessing["size"])
        manifest = read_manifest(path)
        session.training_films = sum(record.split == "train" for record in manifest.records)
    chosen: dict[str, CXRRecord] = {}  # by patient: nobody twice
    for name in ("pleural_effusion", "nodule", "pneumothorax", "consolidation"):  # what a mask shows well
        showing = (r for r in manifest.records if name in {x.name for x in r.labels if x.state == "present"})
        chosen |= {r.patient_id: r for r in islice((r for r in showing if r.patient_id not in chosen), 1)}
    return [patient_card(manifest, record) for record in chosen.values()], path


def patient_card(manifest: Manifest, record: CXRRecord) -> dict[str, Any]:
    """Film, mask, report and numeric truth of one digital patient."""
    who = {"F": "Woman", "M": "Man", None: "Patient"}[record.sex]
    units = {"ml": "mL", "mm": "mm"}
    truth = [("cardiothoracic ratio", f"{record.truth['cardiothoracic_ratio']:.2f}")]
    for name, value in record.truth.items():
        stem, _, unit = name.rpartition("_")
        if unit in units:
            truth.append((words(stem), f"{value:.0f} {units[unit]}"))
    return {
        "image": picture(read_grey(manifest.root / record.image)),
        "mask": overlay(np.asarray(Image.open(manifest.root / record.extra["mask"]))),
        "title": f"{who}, {record.age:.0f} years, {record.view}" if record.age else f"{who}, {record.view}",
        "report": record.findings,
        "truth": truth[:4],
    }


def judge(films: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """What the shipped independent classifier says of films [H,W] in [0,1]: probability of every output, by film."""
    model = load_judge(device="cpu")
    with torch.inference_mode():
        logits = model(torch.stack([torch.from_numpy(film)[None] * 2 - 1 for film in films.values()]))
    return {key: dict(zip(model.outputs, row.sigmoid().tolist())) for key, row in zip(films, logits)}
