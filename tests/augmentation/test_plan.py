"""Plans from the reports of digital patients: what is rare becomes as frequent as the rest, and impossible wishes are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medgen.augmentation.balancing import balancing_weights, draw
from medgen.augmentation.captions import kind_of, written_captions
from medgen.augmentation.plan import plan
from medgen.augmentation.planned import PlanError
from medgen.augmentation.target import Target, count_records, finding_shares
from medgen.config import ConfigError
from medgen.data.ecg_records import ECGRecord
from medgen.data.records import FINDINGS, CXRRecord, ManifestError, read_manifest, write_manifest
from medgen.data.report_labels import label_text
from medgen.digital.chest import draw_study
from medgen.digital.reports import write_report


def reports(count: int, seed: int = 3) -> list[CXRRecord]:
    """Both films of digital patients, as a manifest lists them; no plan opens an image."""
    records = []
    for index in range(count):
        study = draw_study(seed, index)
        findings, impression, labels = write_report(study)
        who = study.patient
        for view in ("PA", "AP"):
            name = f"{study.study_id}-{view}"
            record = CXRRecord(name, who.patient_id, study.study_id, f"{name}.png", view, findings, impression, "train", labels,
                               who.age, who.sex)  # fmt: skip
            records.append(record)
    return records


def states(record: CXRRecord, name: str) -> bool:
    return any(label.name == name and label.state == "present" for label in record.labels)


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 patients of whom five have a pneumothorax: 3 %."""
    records = reports(200)
    having = list(dict.fromkeys(r.patient_id for r in records if states(r, "pneumothorax")))
    kept = [r for r in records if r.patient_id not in having[5:]]
    return write_manifest(kept, tmp_path_factory.mktemp("rare") / "manifest.parquet", name="rare", source="test")


def planned(out: Path) -> tuple[dict, list[dict]]:
    return json.loads((out / "plan.json").read_text()), [
        json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()
    ]


def test_a_rare_finding_becomes_as_frequent_as_the_others(rare: Path, tmp_path: Path) -> None:
    plan(rare, tmp_path, n=160)
    facts, cases = planned(tmp_path)
    assert facts["real"]["findings"]["pneumothorax"] == 10 and len(cases) == 160
    shares = {name: facts["planned"]["findings"][name] / 160 for name in FINDINGS}
    assert np.ptp(list(shares.values())) < 0.03
    assert facts["planned"]["sides"]["nodule, left"] == pytest.approx(facts["planned"]["sides"]["nodule, right"], abs=4)
    assert np.ptp(list(facts["planned"]["groups"].values())) < 12  # sex and age band, of 27 each
    assert facts["most_prompts_of_one_report"] <= 10
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_any_part_of_a_plan_is_balanced_and_findings_go_together_as_in_the_reports(rare: Path, tmp_path: Path) -> None:
    plan(rare, tmp_path, n=160)
    present = [{x["name"] for x in case["labels"] if x["state"] == "present"} for case in planned(tmp_path)[1]]
    assert 5 <= sum("pneumothorax" in names for names in present[:80]) <= 22
    real = {frozenset(x.name for x in r.labels if x.state == "present") for r in read_manifest(rare).records}
    assert set(map(frozenset, present)) <= real
    assert 0.05 < sum(not names for names in present) / 160 < 0.4  # normal films stay


def test_labels_say_what_the_prompt_says_and_the_view_is_in_it(rare: Path, tmp_path: Path) -> None:
    plan(rare, tmp_path, n=40)
    facts, cases = planned(tmp_path)
    for case in cases:
        said = {(x.name, x.state, x.side) for x in label_text(case["prompt"])}
        assert said == {(x["name"], x["state"], x["side"]) for x in case["labels"]}
        assert case["prompt"].startswith(f"{case['view']} chest X-ray. ")
    assert {case["view"] for case in cases} == {"PA", "AP"}
    assert any("reports of real patients" in note for note in facts["notes"])
    assert any("sex and age" in note for note in facts["notes"])


def test_the_same_plan_again_is_the_same(rare: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        plan(rare, tmp_path / name, n=30, seed=5)
    assert (tmp_path / "a/cases.jsonl").read_bytes() == (tmp_path / "b/cases.jsonl").read_bytes()


def test_captions_of_digital_patients_are_written_anew(tmp_path: Path) -> None:
    source = write_manifest(reports(60), tmp_path / "manifest.parquet", name="digital-chest", source="medgen digital chest {}")
    plan(source, tmp_path / "plan", n=10)
    facts, cases = planned(tmp_path / "plan")
    assert facts["captions"] == "written" and not any("real patients" in note for note in facts["notes"])
    assert len({case["prompt"] for case in cases}) == 10
    written = written_captions(200, 1)
    kinds = [kind_of(caption.labels) for caption in written]
    assert 0.12 < kinds.count("normal") / len(kinds) < 0.25 and kinds.count("in doubt") / len(kinds) < 0.06  # as the patients are
    assert [c.text for c in written_captions(5, 1)] == [c.text for c in written[:5]] != [c.text for c in written_captions(5, 2)]


def test_filling_brings_real_and_synthetic_counts_to_one_level(rare: Path) -> None:
    real = count_records(read_manifest(rare).records)
    shares, notes = finding_shares(Target(base="fill", at_most=100), real, 200)
    levels = [real.findings[name] + 200 * shares[name] for name in FINDINGS if shares[name]]
    assert shares["pneumothorax"] == max(shares.values()) and np.ptp(levels) < 1e-6 and not notes


def test_few_real_films_hold_a_finding_back(rare: Path) -> None:
    real = count_records(read_manifest(rare).records)
    shares, (note,) = finding_shares(Target(prevalence={"pneumothorax": 0.5}, at_most=3), real, 200)
    assert shares["pneumothorax"] * 200 == 30 and note.startswith("pneumothorax: 100 films asked, held at 30")


def test_as_in_the_real_films(rare: Path, tmp_path: Path) -> None:
    plan(rare, tmp_path, target="real", n=100)
    facts = planned(tmp_path)[0]
    for what in ("findings", "groups"):
        for name, films in facts["real"][what].items():
            assert facts["planned"][what].get(name, 0) / 100 == pytest.approx(films / facts["real"]["films"], abs=0.03)
    assert not any("sex and age" in note for note in facts["notes"])


def test_a_finding_that_no_real_film_shows_is_pointed_out(rare: Path) -> None:
    real = count_records([r for r in read_manifest(rare).records if not states(r, "edema")])
    shares, (note,) = finding_shares(Target(), real, 100)
    assert shares["edema"] == shares["nodule"] > 0 and note.startswith("edema: no real film shows it")


def test_an_own_target(rare: Path, tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text(
        "counts: {pneumothorax: 30}\nviews: {AP: 1.0}\nperson: true\nsides: real\ngroups: real\n"
    )
    plan(rare, tmp_path, target=str(tmp_path / "target.yaml"), n=60)
    facts, cases = planned(tmp_path)
    assert facts["planned"]["findings"]["pneumothorax"] == pytest.approx(30, abs=3) and facts["planned"]["views"] == {"AP": 60}
    assert all(f"{case['age']:.0f}-year-old {'woman' if case['sex'] == 'F' else 'man'}" in case["prompt"] for case in cases)
    assert (Path(__file__).parents[2] / "configs/augmentation/balance.yaml").is_file()


def test_what_cannot_be_met_is_said(rare: Path, tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text("prevalence: {hyperinflation: 0.9, cardiomegaly: 0.9}\n")  # no report has both
    result = plan(rare, tmp_path, target=str(tmp_path / "target.yaml"), n=40)
    assert any(note.startswith("cardiomegaly: ") and "instead of 90.0%" in note for note in result.notes)


def test_weights_meet_a_target_and_stay_below_their_limit() -> None:
    has = np.array([[1.0]] * 4 + [[0.0]] * 96)
    weights = balancing_weights(has, np.array([0.5]))
    assert weights[:4].sum() == pytest.approx(0.5, abs=1e-3) and weights[4:].std() < 1e-9
    assert balancing_weights(has, np.array([0.5]), largest=0.05).max() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="do not make one whole"):
        balancing_weights(has, np.array([0.5]), largest=0.001)
    times = np.bincount(draw(weights, 40, np.arange(100), np.random.default_rng(0)), minlength=100)
    assert (abs(times - 40 * weights) < 1).all()


def refused(records: list[CXRRecord], tmp_path: Path, **options: object) -> str:
    path = write_manifest(records, tmp_path / "refused.parquet", name="real", source="test")
    with pytest.raises(PlanError) as error:
        plan(path, tmp_path / "none", n=20, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()
    return str(error.value)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    message = refused([r for r in reports(80) if not states(r, "nodule") and not states(r, "edema")], tmp_path)
    assert "states nodule, edema" in message and "prevalence: {nodule: 0, edema: 0}" in message


def test_one_class_only_is_named(tmp_path: Path) -> None:
    only = [r for r in reports(80) if [x.name for x in r.labels if x.state == "present"] == ["nodule"]]
    assert "show nodule" in refused(only, tmp_path)
    normal = [r for r in reports(80) if not any(x.state == "present" for x in r.labels)]
    assert "show no finding" in refused(normal, tmp_path)


def test_patients_of_the_test_films_are_named(tmp_path: Path) -> None:
    records = reports(20)
    test = [replace(r, split="test") for r in reports(22) if r.patient_id >= records[-2].patient_id]
    heldout = write_manifest(test, tmp_path / "heldout.parquet", name="heldout", source="test")
    message = refused(records, tmp_path, heldout=heldout)
    assert "1 patients are both" in message and records[-1].patient_id in message


def test_too_few_reports_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target.yaml").write_text("most_repeats: 1\nprevalence: {nodule: 0.2}\n")
    records = reports(80)
    keep = {p: i for i, p in enumerate(dict.fromkeys(r.patient_id for r in records))}
    path = write_manifest(records, tmp_path / "manifest.parquet", name="real", source="test")
    with pytest.raises(PlanError, match=f"200 films from {len(keep)} reports"):
        plan(path, tmp_path / "none", target=str(tmp_path / "target.yaml"), n=200)


def test_a_manifest_of_another_task_and_a_wrong_key_are_refused(tmp_path: Path, rare: Path) -> None:
    ecg = ECGRecord(record_id="e", patient_id="p", study_id="s", split="train", ecg="e")
    path = write_manifest([ecg], tmp_path / "ecg.parquet", name="ecgs", source="test")
    with pytest.raises(ManifestError, match="of kind 'ecg'; expected a manifest of 'cxr'"):
        plan(path, tmp_path)
    (tmp_path / "target.yaml").write_text("prevalance: {nodule: 0.2}\n")
    with pytest.raises(ConfigError, match="did you mean 'prevalence'"):
        plan(rare, tmp_path, target=str(tmp_path / "target.yaml"))
