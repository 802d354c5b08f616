"""Small packs, keys and answers in the shipped formats, made by hand: what the analysis reads, without building one from images."""

import csv
import hashlib
import json

import numpy as np
import pytest

from medgen.study.responses import COLUMNS, commitment

MARGIN = 0.1
EFFUSION = ["present", "absent", "wrong side", "wrong size"]


def question(name, kind, **more):
    return {"id": name, "kind": kind, "label": name, "required": True, **more}


QUESTIONS = {
    "real_or_synthetic": [
        question("origin", "choice", options=["real", "synthetic"]),
        {**question("comment", "text"), "required": False},
    ],
    "two_alternative": [question("which", "choice", options=["left", "right"])],
    "same_patient": [question("same", "choice", options=["yes", "no"])],
    "likert_realism": [question("realism", "scale", min=1, max=5)],
    "plausible_course": [
        question("expectation", "choice", options=["better", "worse"], before_reveal=True),
        question("plausible", "scale", min=1, max=5, before_reveal=False),
    ],
    "ejection_fraction": [question("ef", "number", min=0, max=100)],
    "progression_order": [question("order", "order", options=["a", "b", "c"])],
    "text_alignment": [question("effusion", "choice", options=EFFUSION)],
    "artefact": [question("points", "points")],
}


class HandMadeStudy:
    """A pack folder with its key; `answer` collects rows, `write` saves them as a reader's CSV."""

    def __init__(self, folder, readers=3, cases=24, repeats=4, task="real_or_synthetic", arms=("real", "model")):
        self.folder, self.pack, self.key_file = folder, folder / "pack", folder / "pack.key.json"
        self.readers = [f"r{j + 1}" for j in range(readers)]
        self.items, self.truth = {}, {}
        self.add_section("1", task, cases, repeats, arms)
        self.rows = []

    def add_section(self, section, task, cases, repeats=0, arms=("real", "model")):
        names = [hashlib.sha256(f"{section}{i}".encode()).hexdigest()[:8] for i in range(cases + repeats)]
        for i, name in enumerate(names):
            arm = arms[(i if i < cases else i - cases) % len(arms)]
            self.items[name] = {
                "task": task,
                "section": section,
                "media": [],
                "questions": QUESTIONS[task],
                "training": False,
            }
            source = {"real": "real", "copied": "copy"}.get(arm, "synthetic")
            self.truth[name] = {
                "arm": arm,
                "source": source,
                "case_id": f"c{i % cases}",
                "repeat_of": names[i - cases] if i >= cases else None,
            }
            self.truth[name]["correct"] = {
                "which": ["left", "right"][i % 2],
                "same": ["yes", "no"][i % 2],
                "ef": 40.0 + i,
                "order": ["a", "b", "c"],
                "effusion": "present",
            }

    def build(self):
        self.pack.mkdir(parents=True)
        orders = {
            r: {"order": [str(n) for n in np.random.default_rng(j).permutation(list(self.items))]}
            for j, r in enumerate(self.readers)
        }
        self.sha = hashlib.sha256(json.dumps(self.items).encode()).hexdigest()
        study = {
            "study_id": "s1",
            "title": "Hand-made study",
            "version": "1",
            "pack_sha256": self.sha,
            "readers": orders,
            "items": self.items,
        }
        self.orders = {reader: entry["order"] for reader, entry in orders.items()}
        page = f'<html><script type="application/json" id="study">{json.dumps(study)}</script></html>'
        key = {"study_id": "s1", "pack_sha256": self.sha, "salt": "salt", "items": self.truth}
        files = {
            "index.html": page,
            "protocol.json": json.dumps({"margin": MARGIN, "hypotheses": "Readers stay within 50 ± 10 %."}),
            "key_commitment.json": json.dumps({"salted_sha256": commitment(key)}),
        }
        for name, text in files.items():
            (self.pack / name).write_text(text)
        sums = [f"{hashlib.sha256(text.encode()).hexdigest()}  {name}" for name, text in files.items()]
        (self.pack / "SHA256SUMS").write_text("\n".join(sums) + "\n")
        self.key_file.write_text(json.dumps(key))
        return self

    def answer(self, reader, item, question, answer, confidence="", ms=4000):
        self.rows.append(
            {
                "study_id": "s1",
                "pack_sha256": self.sha,
                "reader": reader,
                "session": "1",
                "position": self.orders[reader].index(item),
                "item": item,
                "task": self.items[item]["task"],
                "question": question,
                "answer": answer,
                "confidence": confidence,
                "ms": ms,
                "viewer_version": "1",
                "timestamp": "2026-01-05T10:00:00Z",
            }
        )
        return self.rows[-1]

    def write(self, name="answers.csv", rows=None):
        path = self.folder / name
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows if rows is None else rows)
        return path

    def read_by_guessers(self, skill=0.0, spread=0.0, seed=0):
        """Every reader answers every real-or-synthetic item: evidence N(±d/2, 1), confidence 1-3 by its size."""
        rng = np.random.default_rng(seed)
        for reader in self.readers:
            d = skill + spread * rng.normal()
            seen = {}
            for item in self.orders[reader]:
                truth = self.truth[item]
                synthetic = truth["source"] == "synthetic"
                first = seen.setdefault(truth["case_id"], rng.normal(d / 2 if synthetic else -d / 2, 1))
                evidence = first + 0.4 * rng.normal()
                confidence = int(np.digitize(abs(evidence), [0.5, 1.2])) + 1
                self.answer(reader, item, "origin", "synthetic" if evidence > 0 else "real", confidence, int(rng.gamma(4, 2000)))
        return self


@pytest.fixture
def make_study(tmp_path):
    def make(**given):
        return HandMadeStudy(tmp_path / "study", **given)

    return make
