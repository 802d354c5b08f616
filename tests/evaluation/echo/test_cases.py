"""The standard cases: a folder that stands alone, whose fields say what each case tests."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from medgen.data.ecg import read_ecg
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest
from medgen.evaluation.echo.cases import write_echo_cases
from medgen.evaluation.images import EvaluationError
from medgen.sampling.cases import read_cases
from medgen.sampling.echo_cases import EchoAsked


@pytest.fixture(scope="module")
def lines(cases):
    return [json.loads(line) for line in cases.read_text().splitlines()]


def test_the_sampler_reads_them_and_finds_their_files(cases):
    for case in read_cases(cases, EchoAsked):
        if case.conditions.ecg is not None:
            assert (cases.parent / case.conditions.ecg).is_file()
        if case.conditions.first_frame is not None:
            assert (cases.parent / case.conditions.first_frame).is_file()


def test_every_purpose_is_there(lines):
    counts = Counter(line["purpose"] for line in lines)
    assert set(counts) == {"population", "shift", "shuffle", "absent", "ef", "heart_rate", "irregular", "one", "diversity"}
    assert counts["population"] == 10
    assert counts["shift"] == 12
    assert counts["ef"] == 6
    assert len({line["case_id"] for line in lines}) == len(lines)


def test_a_purpose_of_which_none_are_asked_is_left_out(tmp_path, reference):
    none = dict.fromkeys(("shifts", "controls", "grid", "irregular", "joined", "one", "repeats"), 0)
    found = write_echo_cases(reference, tmp_path / "cases.jsonl", split=None, n=2, **none).read_text().splitlines()
    assert {json.loads(line)["purpose"] for line in found} == {"population"}


def test_what_is_held_is_held(lines):
    groups = {}
    for line in lines:
        if "pair_id" in line:
            groups.setdefault(line["pair_id"], []).append(line)
    for name, members in groups.items():
        seeds = {m["seed"] for m in members if m.get("variant") != "seed"}
        assert len(seeds) == 1, name
        assert len({m["record_id"] for m in members}) == 1
        if name.startswith("one"):
            assert len({m["first_frame"] for m in members}) == 1
            assert Counter(m["variant"] for m in members) == Counter(
                ["base", "heart_rate", "ejection_fraction", "ecg_shift", "seed"]
            )


def test_a_shift_moves_the_beats_of_the_video_and_the_second_read_from_the_ecg(lines, reference):
    records = {r.record_id: r for r in read_manifest(reference, record=EchoRecord).records}
    base = {line["pair_id"]: line for line in lines if line.get("variant") == "base"}
    assert not any("first_frame" in line for line in lines if line["purpose"] in ("shift", "shuffle", "absent"))
    for line in (line for line in lines if line.get("shift_s") and line["purpose"] == "shift"):
        own, delta = base[line["pair_id"]], line["shift_s"]
        assert line["ecg_start"] == pytest.approx(records[line["record_id"]].ecg_offset - delta)
        moved = [t for t in line["r_true"] if 0 <= t <= 1.5]
        assert all(min(abs(t - delta - r) for r in own["r_true"]) < 1e-3 for t in moved)
        assert abs(delta) > 2 / line["fps"] or abs(delta) > 0.19 * 60 / 140


def test_shuffled_cases_carry_both_ecgs_and_absent_ones_only_their_own(lines):
    for line in lines:
        if line["purpose"] == "shuffle":
            assert line["r_true"] != line["own_r"]
        if line["purpose"] == "absent":
            assert "ecg" not in line
            assert "r_true" not in line
            assert line["own_r"]


def test_r_peaks_are_those_of_the_copied_signal(lines, cases):
    for line in [line for line in lines if line["purpose"] == "population" and line["rhythm"] == "sinus"][:4]:
        ecg = read_ecg(cases.parent / line["ecg"])
        lead = np.abs(ecg.signal[ecg.leads.index("II")])
        for r in (r for r in line["r_true"] if 0 < r < 1.5):
            at = round((r + line["ecg_start"] - ecg.start) * ecg.rate)
            assert lead[at - 25 : at + 25].max() > 0.6 * np.quantile(lead, 0.995)


def test_the_rates_asked_for_are_spread(lines):
    rates = [line["asked_rate"] for line in lines if line["purpose"] == "heart_rate"]
    assert min(rates) == 40
    assert max(rates) == 140
    slow = [line for line in lines if line["purpose"] == "heart_rate" and line["asked_rate"] == 40]
    assert slow[0]["num_frames"] == 64  # long enough for two beats


def test_a_manifest_without_synchronous_ecgs_is_refused(tmp_path, reference):
    from dataclasses import replace

    from medgen.data.records import write_manifest

    manifest = read_manifest(reference, record=EchoRecord)
    records = [replace(r, ecg=None, ecg_offset=0.0, pairing="none", annotations=None) for r in manifest.records[:3]]
    write_manifest(records, tmp_path / "m.parquet", name="x", source="test")
    with pytest.raises(EvaluationError, match="beat-synchronous"):
        write_echo_cases(tmp_path / "m.parquet", tmp_path / "c.jsonl", split=None)
