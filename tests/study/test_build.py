"""A pack is built from real folders, the same bytes from the same seed, and says no to material that cannot carry the study."""

import filecmp
import json
from collections import Counter
from dataclasses import replace
from itertools import combinations

import av
import numpy as np
import pytest
from PIL import Image
from studies import (
    film,
    write_clip_samples,
    write_clips,
    write_films,
    write_futures,
    write_protocol,
    write_samples,
    write_visits,
    write_volumes,
)

from medgen.data.dicom import write_dx
from medgen.data.records import ManifestError, read_manifest, write_manifest
from medgen.study.build import build
from medgen.study.protocol import ProtocolError
from medgen.study.responses import read_key, read_pack
from medgen.study.tasks import TASKS


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    return {"generated": write_samples(root / "generated", 20), "reference": write_films(root / "clinic", 40)}


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    root = tmp_path_factory.mktemp("echo")
    manifest = write_clips(root / "clinic", 8)
    return {"generated": write_clip_samples(root / "generated", manifest), "reference": manifest}


@pytest.fixture(scope="module")
def courses(tmp_path_factory):
    root = tmp_path_factory.mktemp("courses")
    manifest = write_visits(root / "clinic")
    return {"generated": write_futures(root / "generated", manifest), "reference": manifest}


def opened(built):
    pack = read_pack(built.pack)
    return pack, read_key(built.key, pack)


def protocol_of(kind, path, task, cases=4, **more):
    """A protocol of one section on two arms of echo clips or follow-ups, whose patients may be of any split."""
    arms = f"""
arms:
  - {{name: maker, source: synthetic, kind: {kind}}}
  - {{name: clinic, source: real, kind: {kind}, splits: [train, val, test]}}
sections: [{{name: only, task: {task}, cases: {cases}}}]"""
    text = write_protocol(path, **more).read_text()
    path.write_text(text[: text.index("\narms:")] + arms)
    return path


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_study(films, tmp_path):
    first, again, other = (
        build(write_protocol(tmp_path / f"{name}.yaml", seed=seed), tmp_path / name, **films)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert bytes_of(first.pack) == bytes_of(again.pack)
    assert filecmp.cmp(first.key, again.key, shallow=False)
    assert read_pack(first.pack).orders != read_pack(other.pack).orders
    assert not set(read_pack(first.pack).items) & set(read_pack(other.pack).items)


def test_who_knows_the_seed_but_not_the_images_cannot_name_the_items(films, tmp_path):
    one = build(write_protocol(tmp_path / "study.yaml"), tmp_path / "one", **films)
    changed = write_films(tmp_path / "clinic", 40)
    for path in (tmp_path / "clinic" / "images").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    two = build(tmp_path / "study.yaml", tmp_path / "two", films["generated"], changed)
    assert not set(read_pack(one.pack).items) & set(read_pack(two.pack).items)


def test_the_analysis_reads_pack_and_key(films, tmp_path):
    pack, key = opened(build(write_protocol(tmp_path / "study.yaml"), tmp_path / "pack", **films))
    assert set(pack.items) == set(key)
    assert Counter(entry["arm"] for entry in key.values()) == {"maker": 3, "clinic": 3, "copied": 3}
    assert {entry["source"]: entry["correct"]["origin"] for entry in key.values()} == {
        "synthetic": "synthetic", "real": "real", "copy": "real",
    }  # fmt: skip
    assert len({entry["case_id"] for entry in key.values()}) == 9, "a copy is of another film than those of the real arm"
    assert pack.protocol["margin"] == 0.1 and "seed" not in pack.protocol
    assert (tmp_path / "pack.key.json").stat().st_mode & 0o077 == 0


def test_arms_have_their_sexes_alike(films, tmp_path):
    sections = "[{name: origin, task: real_or_synthetic, cases: 12, balance: sex}]"
    _, key = opened(build(write_protocol(tmp_path / "study.yaml", sections), tmp_path / "pack", **films))
    drawn = Counter((entry["arm"], "FM"[int(entry["case_id"][5:]) % 2]) for entry in key.values())
    assert set(drawn.values()) == {2} and len(drawn) == 6


def test_repeats_come_in_the_other_session_and_each_reader_reads_in_an_order_of_their_own(films, tmp_path):
    sections = "[{name: origin, task: real_or_synthetic, cases: 30, repeats: 0.2, training: 3}]"
    path = write_protocol(tmp_path / "study.yaml", sections, readers=4, sessions=2, more="washout_days: 28")
    pack, key = opened(build(path, tmp_path / "pack", **films))
    study = json.loads((tmp_path / "pack" / "orders" / "reader-01.json").read_text())
    repeats = {item: entry["repeat_of"] for item, entry in key.items() if entry["repeat_of"]}
    assert len(repeats) == 6 and Counter(key[item]["arm"] for item in repeats) == {"maker": 2, "clinic": 2, "copied": 2}
    assert len(set(pack.orders.values())) == 4
    assert all(sorted(order) == sorted(pack.items) for order in pack.orders.values())
    for reader, order in pack.orders.items():
        first = json.loads((tmp_path / "pack" / "orders" / f"{reader}.json").read_text())["sessions"][0]
        assert all(order.index(original) < first <= order.index(item) for item, original in repeats.items())
        assert all(pack.items[item]["training"] for item in order[:3]) and not pack.items[order[3]]["training"]
    assert sum(study["sessions"]) == len(pack.items) and abs(study["sessions"][0] - study["sessions"][1]) <= 4
    trained = {key[item]["case_id"] for item in key if pack.items[item]["training"]}
    assert not trained & {key[item]["case_id"] for item in key if not pack.items[item]["training"]}
    assert all(pack.items[item]["feedback"] for item in key if pack.items[item]["training"])


def test_one_patients_images_and_repeats_are_far_apart(films, tmp_path):
    path = write_protocol(
        tmp_path / "study.yaml", "[{name: origin, task: real_or_synthetic, cases: 60, repeats: 0.2}]", readers=6
    )
    pack, key = opened(build(path, tmp_path / "pack", **films | {"generated": write_samples(tmp_path / "more", 30)}))
    related = [(a, b) for a, b in combinations(key, 2) if key[a]["case_id"] == key[b]["case_id"]]
    distances = [abs(order.index(a) - order.index(b)) for order in pack.orders.values() for a, b in related]
    assert len(related) == 12 and min(distances) >= 72 // 4


def test_paired_arms_show_the_same_patients_apart_and_a_split_plot_keeps_them_with_one_group(films, tmp_path):
    generated = write_samples(tmp_path / "generated", 20)
    lines = [json.loads(line) for line in (generated / "metadata.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):  # each was made from a record of the manifest
        line |= {"record_id": f"film-{i:04d}", "patient_id": f"patient-{i:04d}"}
    (generated / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sections = "[{name: origin, task: real_or_synthetic, cases: 16, paired: true, arms: [maker, clinic]}]"
    path = write_protocol(tmp_path / "study.yaml", sections, readers=4, more="design: split_plot\ngroups: 2")
    pack, key = opened(build(path, tmp_path / "pack", generated, films["reference"]))
    patients = Counter(entry["record_ids"][0] for entry in key.values())
    assert set(patients.values()) == {2} and len(patients) == 8
    read = Counter(frozenset(order) for order in pack.orders.values())
    assert sorted(read.values()) == [2, 2] and len(set.union(*map(set, read))) == 16
    for order in pack.orders.values():
        assert Counter(key[item]["arm"] for item in order) == {"maker": 4, "clinic": 4}
        places = {name: [order.index(i) for i in order if key[i]["record_ids"] == [name]] for name in patients}
        assert all(abs(found[0] - found[1]) > 1 for found in places.values() if found)


# ---------------------------------------------------------------- tasks


def test_a_pair_holds_one_real_film_on_either_side(films, tmp_path):
    path = write_protocol(tmp_path / "study.yaml", "[{name: pairs, task: two_alternative, cases: 16}]")
    pack, key = opened(build(path, tmp_path / "pack", **films))
    sides = Counter((entry["arm"], entry["correct"]["which"]) for entry in key.values())
    assert sides == {(arm, side): 4 for arm in ("maker", "copied") for side in ("left", "right")}
    for item, entry in key.items():
        left, right = (np.asarray(Image.open(tmp_path / "pack" / one["file"])) for one in pack.items[item]["media"])
        noise = {"left": np.diff(left.astype(float)).std(), "right": np.diff(right.astype(float)).std()}
        assert entry["arm"] == "copied" or max(noise, key=noise.get) == entry["correct"]["which"]


def test_a_text_asks_for_its_findings_and_is_shown(films, tmp_path):
    path = write_protocol(tmp_path / "study.yaml", "[{name: text, task: text_alignment, cases: 9}]")
    pack, key = opened(build(path, tmp_path / "pack", **films))
    for item, entry in key.items():
        shown = pack.items[item]
        assert [q["id"] for q in shown["questions"]] == ["pleural_effusion", "pneumothorax", "comment"]
        effusion = "absent" if "No pleural effusion" in shown["prompt"] else "present"
        assert entry["correct"] == {"pleural_effusion": effusion, "pneumothorax": "absent"}


def test_a_control_arm_shows_real_films_beside_another_patients_report(films, tmp_path):
    """Readers who call these texts fitting have not looked; the key holds what the film's own report says."""
    path = write_protocol(
        tmp_path / "study.yaml",
        "[{name: text, task: text_alignment, cases: 12, training: 4}, {name: like, task: likert_realism, cases: 6}]",
    )
    path.write_text(path.read_text().replace("arms:\n", "arms:\n  - {name: wrong-text, source: mismatched}\n", 1))
    pack, key = opened(build(path, tmp_path / "pack", **films))
    reports = {record.record_id: record.findings for record in read_manifest(films["reference"]).records}
    wrong = {item: entry for item, entry in key.items() if entry["arm"] == "wrong-text"}
    assert Counter(pack.items[item]["training"] for item in wrong) == {False: 3, True: 1}
    for item, entry in wrong.items():
        shown, (record,) = pack.items[item], entry["record_ids"]
        assert shown["task"] == "text_alignment", "it is no arm of realism"
        assert entry["source"] == "mismatched" and shown["prompt"] != reports[record]
        own = "absent" if "No pleural effusion" in reports[record] else "present"
        assert entry["correct"] == {"pleural_effusion": own, "pneumothorax": "absent"}
        assert shown["training"] is False or shown["feedback"] == "The text is another patient's report."


def test_a_mismatched_arm_is_for_texts_only(films, tmp_path):
    path = write_protocol(tmp_path / "study.yaml", "[{name: like, task: likert_realism, cases: 6, arms: [maker, wrong-text]}]")
    path.write_text(path.read_text().replace("arms:\n", "arms:\n  - {name: wrong-text, source: mismatched}\n", 1))
    with pytest.raises(ValueError, match="'wrong-text' is mismatched, which is for text_alignment"):
        build(path, tmp_path / "pack", **films)


def test_films_stand_in_mixed_order_and_the_key_puts_them_right(courses, tmp_path):
    pack, key = opened(build(protocol_of("progression", tmp_path / "p.yaml", "progression_order"), tmp_path / "pack", **courses))
    for item, entry in key.items():
        shown, order = pack.items[item], entry["correct"]["order"]
        assert [one["label"] for one in shown["media"]] == shown["questions"][0]["options"] == sorted(order)
        assert len(order) == 3, "as many as were generated, in both arms; no real film among generated ones"
        if entry["source"] == "real":  # the discs of these follow-ups grow
            pixels = {one["label"]: np.asarray(Image.open(tmp_path / "pack" / one["file"])).sum() for one in shown["media"]}
            assert sorted(order, key=pixels.get) == order
    assert len({tuple(entry["correct"]["order"]) for entry in key.values()}) > 1


def test_a_course_shows_its_past_and_only_later_its_future(courses, tmp_path):
    pack, key = opened(build(protocol_of("progression", tmp_path / "p.yaml", "plausible_course"), tmp_path / "pack", **courses))
    for item in key:
        past, future = pack.items[item]["media"]
        assert (past["kind"], past.get("reveal"), future["reveal"]) == ("sequence", None, True)
        assert (len(past["frames"]), len(future["frames"])) == (2, 3), "as many in both arms"
        assert past["frames"][0]["label"] == "day 0", "days since the first film shown, never a date"
        assert [q["id"] for q in pack.items[item]["questions"] if q["before_reveal"]] == ["expectation"]


def test_half_of_the_pairs_are_of_one_patient(courses, tmp_path):
    _, key = opened(build(protocol_of("progression", tmp_path / "p.yaml", "same_patient", 8), tmp_path / "pack", **courses))
    assert Counter((entry["arm"], entry["correct"]["same"]) for entry in key.values()) == {
        (arm, same): 2 for arm in ("maker", "clinic") for same in ("yes", "no")
    }
    for entry in key.values():
        assert len(set(entry["record_ids"])) == (1 if entry["correct"]["same"] == "yes" else 2)


def test_clips_have_one_rate_one_length_and_their_ecg(echo, tmp_path):
    pack, key = opened(build(protocol_of("echo", tmp_path / "p.yaml", "ejection_fraction"), tmp_path / "pack", **echo))
    for item, entry in key.items():
        assert entry["correct"]["ef"] == 30.0 + int(entry["case_id"][-4:])
        (one,) = pack.items[item]["media"]
        with av.open(str(tmp_path / "pack" / one["file"])) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert (len(frames), float(stream.average_rate), not container.metadata.get("title")) == (9, 20.0, True)
            assert all(frame.key_frame for frame in _decoded(tmp_path / "pack" / one["file"])), (
                "a viewer steps through them exactly"
            )
        assert frames[0].shape[:2] == (one["height"], one["width"])
        strip = frames[0][one["width"] :]
        assert (strip[..., 1].astype(int) - strip[..., 0]).max() > 40, "the trace is green"
        assert strip[:20, 160:].max() < 60, "and no clip is marked synthetic on its picture"


def _decoded(path):
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def test_a_volume_is_a_stack_as_radiologists_look_at_it(tmp_path):
    manifest = write_volumes(tmp_path / "ct")
    path = protocol_of("progression", tmp_path / "p.yaml", "likert_realism", 2)
    text = path.read_text().replace("  - {name: maker, source: synthetic, kind: progression}\n", "")
    path.write_text(text + "\nmedia: {slices: 6}\n")
    pack, _ = opened(build(path, tmp_path / "pack", None, manifest))
    for shown in pack.items.values():
        (one,) = shown["media"]
        assert (one["kind"], len(one["frames"]), one["width"]) == ("stack", 6, 24)
        first, last = (np.asarray(Image.open(tmp_path / "pack" / one["frames"][k]["file"])).astype(int) for k in (0, -1))
        assert first[:2].max() < first[12, 12], "the front is above"
        assert first[11, 6] < first[11, 16], "the patient's right, with the darker lung, is on the left"
        assert first[20, 2] > last[20, 2], "the head's side comes first"


@pytest.mark.parametrize("task", ["artefact", "likert_realism"])
def test_tasks_without_a_right_answer_have_none(films, tmp_path, task):
    path = write_protocol(tmp_path / "study.yaml", f"[{{name: only, task: {task}, cases: 6}}]")
    pack, key = opened(build(path, tmp_path / "pack", **films))
    assert {entry["correct"] for entry in key.values()} == {None}
    assert {q["id"] for shown in pack.items.values() for q in shown["questions"]} == {q["id"] for q in TASKS[task].asks(())}


def test_questions_of_the_studys_own_come_after_the_tasks(films, tmp_path):
    sections = """
  - name: only
    task: likert_realism
    cases: 3
    questions:
      - {id: realism, label: "Would you report this film?"}
      - {id: quality, kind: choice, options: [good, poor], label: Quality, required: true}"""
    pack, _ = opened(build(write_protocol(tmp_path / "study.yaml", sections), tmp_path / "pack", **films))
    asked = next(iter(pack.items.values()))["questions"]
    assert [(q["id"], q["kind"], q["required"]) for q in asked] == [
        ("realism", "scale", True), ("quality", "choice", True), ("comment", "text", False),
    ]  # fmt: skip
    assert asked[0]["label"] == "Would you report this film?"


# ---------------------------------------------------------------- refused


def test_too_few_cases_are_counted_by_section_and_arm(films, tmp_path):
    path = write_protocol(tmp_path / "study.yaml", "[{name: origin, task: real_or_synthetic, cases: 90, training: 3}]")
    with pytest.raises(ProtocolError) as error:
        build(path, tmp_path / "pack", **films)
    assert "section 'origin', arm 'maker': 30 cases needed, 19 left: 20 in " in str(error.value)
    assert "arm 'copied': 30 cases needed, 8 left" in str(error.value)
    assert not (tmp_path / "pack").exists() and not (tmp_path / "pack.key.json").exists()


def test_samples_are_not_taken_for_real(films, tmp_path):
    path = write_protocol(tmp_path / "study.yaml")
    with pytest.raises(ProtocolError, match=r"arm 'clinic' is real, but .* is a folder of samples"):
        build(path, tmp_path / "pack", films["generated"], films["generated"])
    marked = write_films(tmp_path / "marked", 20, extra={"synthetic": True})
    with pytest.raises(ProtocolError, match="film-0000 of .* is marked synthetic"):
        build(path, tmp_path / "pack", films["generated"], marked)
    hidden = write_films(tmp_path / "hidden", 20)
    for i, image in enumerate((tmp_path / "hidden" / "images").iterdir()):
        image.write_bytes((films["generated"] / f"case-{1000 + i}_000.png").read_bytes())
    for task in ("real_or_synthetic", "two_alternative"):
        write_protocol(path, f"[{{name: only, task: {task}, cases: 4, arms: [maker, clinic]}}]")
        with pytest.raises(ProtocolError, match="arm 'clinic' is real, but .*png is marked synthetic"):
            build(path, tmp_path / "pack", films["generated"], hidden)


def test_a_marked_dicom_is_not_taken_for_real(films, tmp_path):
    clinic = write_films(tmp_path / "clinic", 20)
    records = [replace(record, image=f"{record.record_id}.dcm") for record in read_manifest(clinic).records]
    for record in records:
        pixels = np.rint(film(1) * 255).astype(np.uint8)
        write_dx(tmp_path / "clinic" / record.image, pixels, patient_id="a", study_id="a", record_id="a", model="m", seed=0)
    write_manifest(records, clinic, name="films", source="test")
    with pytest.raises(ProtocolError, match="dcm is marked synthetic"):
        build(write_protocol(tmp_path / "study.yaml"), tmp_path / "pack", films["generated"], clinic)


def test_digital_patients_may_stand_for_real_and_readers_are_told(films, tmp_path):
    digital = write_films(tmp_path / "digital", 20, source='medgen digital chest {"seed": 3}')
    built = build(write_protocol(tmp_path / "study.yaml"), tmp_path / "pack", films["generated"], digital)
    page = (built.pack / "index.html").read_text()
    assert "computed phantoms, not people" in page
    assert read_pack(built.pack).protocol["real_images"] == "digital patients (computed)"


def test_real_images_that_the_generator_was_trained_on_are_left_out(films, tmp_path):
    train = write_films(tmp_path / "train", 20, split="train")
    with pytest.raises(ProtocolError, match="arm 'clinic': none of the 20 records .* is in split test"):
        build(write_protocol(tmp_path / "study.yaml"), tmp_path / "pack", films["generated"], train)


def test_real_films_are_no_synthetic_arm(films, tmp_path):
    lines = [json.loads(line) for line in (films["generated"] / "metadata.jsonl").read_text().splitlines()]
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "metadata.jsonl").write_text(json.dumps({**lines[0], "synthetic": False}) + "\n")
    with pytest.raises(ProtocolError, match="line 1: not marked synthetic, but arm 'maker' is"):
        build(write_protocol(tmp_path / "study.yaml"), tmp_path / "pack", tmp_path / "generated", films["reference"])


def test_another_modality_is_refused(films, echo, tmp_path):
    path = write_protocol(tmp_path / "study.yaml")
    with pytest.raises(ProtocolError, match="is of kind echo, but arm 'maker' shows chest"):
        build(path, tmp_path / "pack", echo["generated"], films["reference"])
    with pytest.raises(ProtocolError, match="arm 'clinic' shows chest, but .* lists records of kind 'echo'"):
        build(path, tmp_path / "pack", films["generated"], echo["reference"])


def test_missing_files_and_paths_that_leave_the_folder_are_named(films, tmp_path):
    path, lost = write_protocol(tmp_path / "study.yaml"), write_samples(tmp_path / "generated", 12)
    (lost / "case-1003_000.png").unlink()
    with pytest.raises(ProtocolError, match=r"line 4: case-1003_000.png is missing"):
        build(path, tmp_path / "pack", lost, films["reference"])
    (lost / "metadata.jsonl").write_text('{"file_name": "../secret.png", "case_id": "a", "synthetic": true}\n')
    with pytest.raises(ProtocolError, match="leads out of"):
        build(path, tmp_path / "pack", lost, films["reference"])
    broken = tmp_path / "manifest.parquet"
    broken.write_bytes(b"nothing")
    with pytest.raises(ManifestError, match="not a readable Parquet"):
        build(path, tmp_path / "pack", films["generated"], broken)


def test_larger_real_films_are_brought_to_the_generators_size_never_the_other_way(films, tmp_path):
    large = write_films(tmp_path / "large", 20, side=48)
    path = write_protocol(tmp_path / "study.yaml")
    pack = read_pack(build(path, tmp_path / "pack", films["generated"], large).pack)
    assert {(one["width"], one["height"]) for shown in pack.items.values() for one in shown["media"]} == {(32, 32)}
    write_protocol(path, more="media: {size: 48}")
    with pytest.raises(ProtocolError, match=r"media.size 48 would enlarge some images and not others.*use at most 32"):
        build(path, tmp_path / "pack2", films["generated"], large)


def test_a_pack_that_is_there_stays_as_it_is(films, tmp_path):
    path = write_protocol(tmp_path / "study.yaml")
    built = build(path, tmp_path / "pack", **films)
    with pytest.raises(ProtocolError, match="is there already"):
        build(path, tmp_path / "pack", **films)
    built.pack.rename(tmp_path / "moved")
    with pytest.raises(ProtocolError, match="key.json is there already"):
        build(path, tmp_path / "pack", **films)


def test_a_films_grey_values_are_its_own(films, tmp_path):
    pack, key = opened(build(write_protocol(tmp_path / "study.yaml"), tmp_path / "pack", **films))
    for item, entry in key.items():
        number = int(entry["case_id"].split("-")[1])
        shown = np.asarray(Image.open(tmp_path / "pack" / pack.items[item]["media"][0]["file"]))
        assert np.array_equal(shown, np.rint(film(number, blurred=entry["source"] == "synthetic") * 255))
