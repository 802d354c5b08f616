"""A protocol says everything before a study begins, and what cannot be carried out is refused with what would be right."""

from pathlib import Path

import pytest
from studies import write_films, write_protocol

from medgen.config import ConfigError
from medgen.data.records import FindingLabel
from medgen.study.protocol import Protocol, ProtocolError, find_generated, find_manifest, read_protocol
from medgen.study.sections import SIGNALS
from medgen.study.tasks import TASKS, finding_questions

SHIPPED = sorted(Path("configs/study").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_protocol_is_read(path):
    protocol = read_protocol(path)
    assert all(protocol.arms_of(section) for section in protocol.sections)
    assert {protocol.kind(arm) for arm in protocol.arms} <= {material.kind for material in protocol.materials}


def test_the_shipped_protocols_show_every_task():
    protocols = {path.stem: read_protocol(path) for path in SHIPPED}
    assert sum(section.cases for section in protocols["digital_chest"].sections) == 40
    assert {section.task for section in protocols["digital_all_tasks"].sections} == set(TASKS)


def test_the_analysis_knows_the_signal_of_every_two_way_choice():
    for task, signal in SIGNALS.items():
        first = TASKS[task].asks(())[0]
        assert signal in [option["value"] for option in first["options"]] and first["confidence"]


def test_readers_are_named_or_counted(tmp_path):
    assert read_protocol(write_protocol(tmp_path / "a.yaml", readers=2)).reader_ids == ("reader-01", "reader-02")
    assert read_protocol(write_protocol(tmp_path / "b.yaml", readers="[ada, ben]")).reader_ids == ("ada", "ben")


def test_findings_are_asked_as_the_text_has_them():
    labels = (
        FindingLabel("pleural_effusion", "present", "left", "small"),
        FindingLabel("pneumothorax", "absent"),
        FindingLabel("edema", "uncertain"),
    )
    effusion, pneumothorax, comment = finding_questions(labels)
    assert [option["value"] for option in effusion["options"]] == ["present", "absent", "wrong side", "wrong size"]
    assert [option["value"] for option in pneumothorax["options"]] == ["absent", "present"]
    assert "small, left" in effusion["label"] and comment["id"] == "comment" and not comment["required"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sections": "[{name: a, task: real_or_sinthetic, cases: 9}]"}, "did you mean 'real_or_synthetic'"),
        (
            {"sections": "[{name: a, task: real_or_synthetic, cases: 9, arms: [clinic, copied]}]"},
            "needs a real and a synthetic arm",
        ),
        ({"sections": "[{name: a, task: real_or_synthetic, cases: 9, arms: [clinic, makers]}]"}, "unknown arms makers"),
        ({"sections": "[{name: a, task: likert_realism, cases: 2}]"}, "2 cases for 3 arms"),
        ({"sections": "[{name: a, task: ejection_fraction, cases: 9, arms: [maker]}]"}, "is made from echo, not from chest"),
        ({"sections": "[{name: a, task: artefact, cases: 9}, {name: a, task: artefact, cases: 9}]"}, "is there twice"),
        ({"more": "washout_days: 28"}, "set sessions: 2"),
        ({"more": "design: split_plot"}, "2 to 2 groups"),
        ({"more": "groups: 2"}, "only a split plot has groups"),
        ({"more": "margins: 0.2"}, "did you mean 'margin'"),
        ({"readers": "[ada, ada]"}, "each id once"),
        ({"readers": "[../ada]"}, "readers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_carried_out_is_refused(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        read_protocol(write_protocol(tmp_path / "study.yaml", **options))


def test_a_protocol_stays_what_it_was(tmp_path):
    protocol = read_protocol(write_protocol(tmp_path / "study.yaml"))
    with pytest.raises(ValueError, match="frozen"):
        protocol.margin = 0.3
    assert Protocol.model_validate(protocol.model_dump(mode="json")) == protocol


def test_the_material_is_found_or_its_place_is_said(tmp_path):
    protocol = read_protocol(write_protocol(tmp_path / "study.yaml"))
    maker, clinic, _ = protocol.arms
    manifest = write_films(tmp_path / "reference" / "chest", 2)
    assert find_manifest(protocol, clinic, tmp_path / "reference") == manifest
    assert find_manifest(protocol, clinic, manifest) == manifest
    with pytest.raises(ProtocolError, match="give --reference"):
        find_manifest(protocol, clinic, None)
    with pytest.raises(ProtocolError, match=r"arm 'maker': no samples .* at .*maker/metadata.jsonl or "):
        find_generated(maker, tmp_path)
