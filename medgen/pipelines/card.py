"""The model card that every exported pipeline carries: what it is, what made it, what it must not be used for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from diffusers import DiffusionPipeline

from medgen import __version__
from medgen.config import Config

_BODY = """
# {title}

A latent diffusion model that generates **synthetic** chest X-rays from report text, made with medgen {version}.

```python
from medgen.pipelines.text_to_cxr import TextToCXRPipeline

pipeline = TextToCXRPipeline.from_pretrained("{title}")
pipeline("Small left pleural effusion.").images[0]
```

| part | class | parameters |
|---|---|---|
{parts}

Images are {size} x {size} pixels, greyscale. Defaults: {steps} steps, guidance scale {guidance}.

## Limits

For research. Not a medical device: nothing that it generates is a finding in a person, and no diagnosis may rest on it. What it
knows is what its training data show; text beyond that is followed poorly or not at all.

## Recipe

```yaml
{recipe}```
"""


def write_model_card(folder: Path, name: str, pipeline: DiffusionPipeline, recipe: Config) -> None:
    """Write `folder/README.md`. Folders of the machine that trained it are left out: names of files and models stay."""
    front = {
        "library_name": "medgen",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "medical", "chest-x-ray", "synthetic"],
    }
    defaults = {
        "size": pipeline.config["preprocessing"]["size"],
        "steps": pipeline.config["num_inference_steps"],
        "guidance": pipeline.config["guidance_scale"],
    }
    write_card(folder, front, _BODY, name, pipeline, recipe, **defaults)


_ECHO_BODY = """
# {title}

A latent rectified flow that generates **synthetic** echocardiography clips that follow an ECG, made with medgen {version}.

```python
from medgen.data.ecg import read_ecg
from medgen.pipelines.ecg_to_echo import ECGToEchoPipeline

pipeline = ECGToEchoPipeline.from_pretrained("{title}")
clip = pipeline(read_ecg("record.hea"), ejection_fraction=45, view="A4C", num_frames=64)
clip.frames, clip.times, clip.flags  # [1, 64, {size}, {size}] in [0, 1], seconds, what was wrong with the ECG
```

| part | class | parameters |
|---|---|---|
{parts}

Frames are {size} x {size} pixels, greyscale, at {fps} Hz; windows of {frames} frames are joined to clips of any length. Every
condition may be left out: ECG (any leads, any rate, mV), ejection fraction (percent), view, first frame. Defaults: {steps} steps,
guidance scale {guidance}.

## Limits

For research. Not a medical device: nothing that it generates is a finding in a person, and no diagnosis may rest on it. An ECG
decides when a heart contracts, not how well: without an ejection fraction in the request, the one shown is a guess. What it knows
of hearts, machines and rhythms is what its training data show.

## Recipe

```yaml
{recipe}```
"""


def write_echo_card(folder: Path, name: str, pipeline: DiffusionPipeline, recipe: Config) -> None:
    """Write `folder/README.md` of an ECG-to-echo pipeline."""
    front = {
        "library_name": "medgen",
        "pipeline_tag": "text-to-video",
        "tags": ["diffusers", "medical", "echocardiography", "ecg", "synthetic"],
    }
    shape = pipeline.config["preprocessing"]
    values = {key: shape[key] for key in ("size", "fps", "frames")}
    values |= {"steps": pipeline.config["num_inference_steps"], "guidance": pipeline.config["guidance_scale"]}
    write_card(folder, front, _ECHO_BODY, name, pipeline, recipe, **values)


_PROGRESSION_BODY = """
# {title}

A latent {kind} that forecasts **synthetic** follow-up images of a patient at any dates from any past visits, made with medgen {version}.

```python
from medgen.pipelines.progression import History, ProgressionPipeline

pipeline = ProgressionPipeline.from_pretrained("{title}")
history = History(images, times=[0, 40])  # [2, 1, *S] in [0, 1]; times in {unit}
pipeline(history, times=[70, 100], num_trajectories=8).frames  # [8, 2, *S]: eight futures, each one draw
```

| part | class | parameters |
|---|---|---|
{parts}

Images have {size} pixels a side. Treatments it knows: {events}. Covariates: {covariates}. All may be missing.
Defaults: {steps} steps, guidance scale {guidance}, the nearest {history} visits.

## Limits

For research. Not a medical device: a forecast shows what often followed in the training data, not what will happen to a person. A
treatment changed in the request shows the model's response, **not a causal effect**.

## Recipe

```yaml
{recipe}```
"""


def write_progression_card(folder: Path, name: str, pipeline: DiffusionPipeline, recipe: Config) -> None:
    """Write `folder/README.md` of a progression pipeline."""
    front = {
        "library_name": "medgen",
        "pipeline_tag": "image-to-image",
        "tags": ["diffusers", "medical", "longitudinal", "disease-progression", "synthetic"],
    }
    config, known = pipeline.config, pipeline.conditioner.config
    values = {
        "kind": "regression" if config["deterministic"] else "rectified flow",
        "unit": config["time_unit"],
        "size": config["preprocessing"]["size"],
        "events": ", ".join(known["events"]) or "none",
        "covariates": ", ".join([*known["numbers"], *known["words"]]) or "none",
        "steps": config["num_inference_steps"],
        "guidance": config["guidance_scale"],
        "history": config["max_history"],
    }
    write_card(folder, front, _PROGRESSION_BODY, name, pipeline, recipe, **values)


def write_card(
    folder: Path, front: dict[str, Any], body: str, name: str, pipeline: DiffusionPipeline, recipe: Config, **values: Any
) -> None:
    """`folder/README.md` of any pipeline: `front` as its YAML head; `body` has {title}, {version}, {parts}, {recipe} and `values`."""
    modules = {key: part for key, part in pipeline.components.items() if hasattr(part, "parameters")}
    parts = "\n".join(
        f"| {key} | {type(part).__name__} | {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M |"
        for key, part in modules.items()
    )
    text = yaml.safe_dump(_without_folders(recipe.model_dump(mode="json")), sort_keys=False)
    filled = body.format(title=name, version=__version__, parts=parts, recipe=text, **values)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{filled}")


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value
