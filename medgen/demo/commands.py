"""The commands that the demo's page offers for doing each step again, by hand and at full size."""

from __future__ import annotations

import shlex

from markupsafe import Markup

from medgen.demo.page import code
from medgen.demo.session import Session
from medgen.sampling.source import find_pipeline


def commands(session: Session) -> dict[str, Markup]:
    """One block of commands per section of the page."""
    names = (session.name, session.echo, session.progression, str(session.out))
    pipeline, echo, progression, out = (shlex.quote(word) for word in names)
    blocks = {
        "sample": f"""
medgen sample text-to-cxr --pipeline {pipeline} --prompt "Large left pleural effusion." --seed 7 --out out/effusion
medgen sample text-to-cxr --pipeline {pipeline} --cases {out}/prompts.jsonl --out out/again   # these films, once more

# Python
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
pipeline = TextToCXRPipeline.from_pretrained({str(session.source.folder)!r})
pipeline("Large left pleural effusion.").images[0].save("film.png")""",
        "patients": """
medgen digital chest --n 6000 --seed 1 --size 128 --out data/digital_chest
medgen digital chest --n 100 --seed 2 --size 512 --dicom --out data/digital_dicom   # as DICOM files""",
        "train": f"""
medgen train text-to-cxr --config {out}/training/recipe.yaml train.out=runs/mine train.steps=2000   # any field can be overridden
medgen data build --help                                              # your folder becomes a manifest
medgen train text-to-cxr --config configs/text_to_cxr/digital_chest.yaml data.manifest=data/mine/manifest.parquet
accelerate launch --config_file configs/accelerate/ddp.yaml train/text_to_cxr.py --config RECIPE.yaml   # many GPUs""",
        "evaluate": f"""
medgen digital chest --n 2000 --seed 99 --size 128 --out data/held_out
medgen evaluate cases --reference data/held_out/manifest.parquet --out out/cases.jsonl --n 400 --pairs 120
medgen sample text-to-cxr --pipeline {pipeline} --cases out/cases.jsonl --out out/generated
medgen evaluate text-to-cxr --generated out/generated --reference data/held_out/manifest.parquet --out out/report""",
        "echo": f"""
medgen sample ecg-to-echo --pipeline {echo} --ecg sinus-60 --ejection-fraction 55 --out out/echo     # also: sinus-100, af, pvc
medgen sample ecg-to-echo --pipeline {echo} --ecg YOUR_RECORD.hea --ecg-start 2 --num-frames 64 --out out/mine
medgen sample ecg-to-echo --pipeline {echo} --cases {out}/echo/cases.jsonl --out out/again           # these clips, once more
medgen digital echo --n 500 --seed 1 --out data/digital_echo                                         # digital hearts, with truth

# Python
from medgen.data.ecg import read_ecg
from medgen.pipelines.ecg_to_echo import ECGToEchoPipeline
pipeline = ECGToEchoPipeline.from_pretrained({str(find_pipeline(session.echo).folder)!r})
frames = pipeline(read_ecg("YOUR_RECORD.hea"), start_seconds=2.0, ejection_fraction=55).frames[0]   # [T, H, W] in [0, 1]""",
        "progression": f"""
medgen digital progression --n 200 --seed 1 --out data/follow_up                                     # digital follow-ups, with truth
medgen sample progression --pipeline {progression} --past 0=FIRST.png 40=SECOND.png --times 70 100 --n 8 --out out/mine
medgen sample progression --pipeline {progression} --cases {out}/futures.jsonl --root {out}/follow_up --out out/again   # these, once more

# Python
from medgen.pipelines.progression import History, ProgressionPipeline
pipeline = ProgressionPipeline.from_pretrained({str(find_pipeline(session.progression).folder)!r})
pipeline(History(images, times=[0, 40]), times=[70, 100], num_trajectories=8).frames                 # [8, 2, H, W] in [0, 1]""",
        "study": f"""
medgen study plan --help                                              # how many readers and cases a claim needs, by simulation
medgen study sample --protocol configs/study/digital_chest.yaml --out runs/study/samples             # every arm that the protocol asks for
medgen study build --protocol configs/study/digital_chest.yaml --generated runs/study/samples \\
  --reference runs/study/samples/reference --out runs/study/pack
medgen study serve --pack {out}/study/pack                            # many readers, each by a link of their own
medgen study analyze --pack {out}/study/pack --responses ANSWERS.csv --key {out}/study/pack.key.json --out out/report""",
    }
    return {name: code(text) for name, text in blocks.items()}
