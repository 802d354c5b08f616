"""NIfTI, MP4, WFDB and Hugging Face releases read back with the libraries that their users have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pytest
import wfdb
from huggingface_hub import DatasetCard
from PIL import Image
from samples import PERSONAL, RAS, bytes_of, film, hounsfield, write_clips, write_edits, write_films, write_visits, write_volumes

from medgen.data.ecg_files import read_ecg
from medgen.data.video import read_video
from medgen.export import hf, mp4, nifti
from medgen.export import wfdb as records
from medgen.export.source import ExportError


def impersonal(release: dict[str, bytes]) -> bool:
    return not [name for name, content in release.items() for word in PERSONAL if word in name or word.encode() in content]


def test_volumes_become_a_bids_derivative_with_values_and_affine_as_sampled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    nifti.export(write_volumes(tmp_path / "s", hounsfield(), RAS), out, progress=False)
    nifti.export(write_volumes(tmp_path / "again", hounsfield(), RAS), tmp_path / "two", progress=False)
    assert bytes_of(out) == bytes_of(tmp_path / "two") and impersonal(bytes_of(out))
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and [g["Name"] for g in description["GeneratedBy"]] == ["medgen", "tiny"]
    (subject,) = out.glob("sub-*")
    first, second = sorted(subject.rglob("*.nii.gz"))
    assert re.fullmatch(r"sub-SYN[0-9a-f]{12}_ses-01_desc-synthetic_CT\.nii\.gz", first.name) and second.parts[-3] == "ses-02"
    image: Any = nibabel.load(first)
    assert np.array_equal(np.asarray(image.dataobj), hounsfield()) and image.get_data_dtype() == np.int16
    assert np.array_equal(image.affine, RAS) and bytes(image.header["descrip"].item()).startswith(b"SYNTHETIC tiny abab")
    said = json.loads(first.with_name(first.name.replace(".nii.gz", ".json")).read_text())
    assert said["Synthetic"] is True and said["ModelSHA256"] == "ab" * 32 and (said["Units"], said["Time"]) == ("HU", 5.0)
    people = (out / "participants.tsv").read_text().splitlines()
    assert people[1].split("\t") == [subject.name, "n/a", "F", "true"]


def test_clips_for_eyes_keep_number_and_rate_of_frames_and_say_what_they_are(tmp_path: Path) -> None:
    clips, out = write_clips(tmp_path / "s", tmp_path / "cases"), tmp_path / "out"
    mp4.export(clips, out, ecg_root=tmp_path / "cases", progress=False)
    assert impersonal(bytes_of(out)) and len(list(out.glob("*.mp4"))) == 2
    shown = {}
    for path in out.glob("SYN-*.mp4"):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.frames, float(stream.average_rate or 0)) == (9, 30.0) and stream.codec_context.name == "h264"
            assert container.metadata["title"].startswith("SYNTHETIC") and container.metadata["comment"].startswith("Synthetic")
            assert json.loads(container.metadata["comment"].split("used to treat one. ")[1])["patient"] == path.stem
            shown[path] = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)
    green = {path: int(((f[..., 1] > f[..., 0] + 40) & (f[..., 1] > f[..., 2] + 20)).sum()) for path, f in shown.items()}
    for frames in shown.values():
        band = frames[:, :22]
        assert ((band[..., 0] > 180) & (band[..., 2] < 180)).sum(axis=(1, 2)).min() > 200  # the label, on every frame
    assert max(green.values()) > 1000 and min(green.values()) < 100  # the ECG's trace; the second clip has none
    source, _ = read_video(clips / "p10000032-0_000.avi")
    match = [np.corrcoef(source[0].ravel(), _reduced(f[0], source[0].shape))[0, 1] for f in shown.values()]
    assert max(match) > 0.9
    again = tmp_path / "again"
    mp4.export(clips, again, ecg_root=tmp_path / "cases", progress=False)
    assert bytes_of(again) == bytes_of(out)


def _reduced(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The clip's part of a picture at its own size again: below the band, enlarged ten times for 33 columns."""
    part = picture[22 : 22 + 10 * shape[0], : 10 * shape[1], 0]
    return part.reshape(shape[0], 10, shape[1], 10).mean(axis=(1, 3)).ravel()


def test_a_patients_ecg_is_not_burned_in(tmp_path: Path, capsys: Any) -> None:
    clips = write_clips(tmp_path / "s", tmp_path / "cases", comments=())
    mp4.export(clips, tmp_path / "out", ecg_root=tmp_path / "cases", progress=False)
    assert "ECG not shown: its header does not say SYNTHETIC" in capsys.readouterr().out
    for path in (tmp_path / "out").glob("*.mp4"):
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
        assert ((frame[..., 1] > frame[..., 0] + 40) & (frame[..., 1] > frame[..., 2] + 20)).sum() < 100
    with pytest.raises(ExportError, match="none of these clips has an ECG that may be released"):
        records.export(clips, tmp_path / "records", ecg_root=tmp_path / "cases", progress=False)


def test_wfdb_records_keep_every_sample_and_say_they_are_synthetic(tmp_path: Path) -> None:
    clips, out = write_clips(tmp_path / "s", tmp_path / "cases"), tmp_path / "out"
    records.export(clips, out, ecg_root=tmp_path / "cases", progress=False)
    assert impersonal(bytes_of(out))
    (name,) = (out / "RECORDS").read_text().split()
    made = wfdb.rdrecord(str(out / name), physical=False)
    source = wfdb.rdrecord(str(tmp_path / "cases/ecg/p10000032"), physical=False)
    assert np.array_equal(made.d_signal, source.d_signal) and made.adc_gain == source.adc_gain and made.fs == source.fs
    assert made.sig_name == source.sig_name and made.comments[0].startswith("SYNTHETIC")
    np.testing.assert_array_equal(read_ecg(out / name).signal, read_ecg(tmp_path / "cases/ecg/p10000032").signal)


def test_a_recording_that_changed_since_is_refused(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "s", tmp_path / "cases")
    path = tmp_path / "cases/ecg/p10000032.dat"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(ExportError, match="is not the recording that the clip was made from"):
        records.export(clips, tmp_path / "out", ecg_root=tmp_path / "cases", progress=False)
    (tmp_path / "cases/ecg/p10000032.hea").unlink()
    with pytest.raises(ExportError, match="there is no file ecg/p10000032"):
        records.export(clips, tmp_path / "out", ecg_root=tmp_path / "cases", progress=False)


def test_what_a_verb_cannot_make_of_a_folder_it_says(tmp_path: Path) -> None:
    films = write_films(tmp_path / "films")
    for verb, what in ((nifti, "forecast volumes"), (mp4, "echo clips"), (records, "echo clips")):
        with pytest.raises(ExportError, match=f"holds films from text, and .* made from {what}"):
            verb.export(films, tmp_path / "out", progress=False)
    with pytest.raises(ExportError, match="expected one of the Hub's identifiers"):
        hf.export(films, tmp_path / "out", license="My own!", progress=False)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_dataset_folder_has_films_with_their_metadata_beside_them(bits: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hf.export(write_films(tmp_path / "s", bits), out, license="cc-by-4.0", progress=False)
    rows = [json.loads(row) for row in (out / "data/metadata.jsonl").read_text().splitlines()]
    assert {row["file_name"] for row in rows} == {path.name for path in (out / "data").glob("*.png")} and impersonal(
        bytes_of(out)
    )
    for i, row in enumerate(rows):
        with Image.open(out / "data" / row["file_name"]) as image:
            values, text = np.asarray(image), dict(getattr(image, "text", {}))
        assert np.array_equal(values, np.rint(film(i) * (2**bits - 1))) and text["Synthetic"] == "true" and "case_id" not in text
        assert row["synthetic"] is True and row["prompt"] == "Small left effusion." and row["age"] == 90.0 and "patient_id" in row
    assert [row["view"] for row in rows] == [None, "AP"] and len({row["patient_id"] for row in rows}) == 2


def test_the_card_is_read_by_the_hub_and_says_the_limits(tmp_path: Path) -> None:
    said = {}
    for write, words in (
        (write_films, "No patient is shown"),
        (write_visits, "not observations"),
        (write_edits, "is to be kept"),
    ):
        folder = write(tmp_path / write.__name__)
        hf.export(folder, tmp_path / f"{write.__name__}-out", name="A set", progress=False)
        card = DatasetCard.load(tmp_path / f"{write.__name__}-out" / "README.md")
        assert words in card.text and "ab" * 32 in card.text and "State" not in card.text.split("##")[0]
        assert card.data.license == "other" and "No license is stated yet" in card.text and "synthetic" in card.data.tags
        said[write.__name__] = card.data
    data = said["write_films"].to_dict()
    assert data["task_categories"] == ["text-to-image"] and data["size_categories"] == ["n<1K"] and data["pretty_name"] == "A set"
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "data/**"}]


def test_croissant_names_every_file_with_its_hash_and_that_it_is_synthetic(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hf.export(write_visits(tmp_path / "s"), out, progress=False)
    said = json.loads((out / "croissant.json").read_text())
    assert said["rai:hasSyntheticData"] is True and "http://mlcommons.org/croissant/RAI/1.0" in said["conformsTo"]
    sums = dict(reversed(row.split("  ")) for row in (out / "SHA256SUMS").read_text().splitlines())
    listed = {one["contentUrl"]: one["sha256"] for one in said["distribution"]}
    assert listed == {name: digest for name, digest in sums.items() if name.startswith("data/")}
    fields = {field["name"]: field["dataType"] for field in said["recordSet"][0]["field"]}
    assert fields["synthetic"] == "sc:Boolean" and fields["time"] == "sc:Float" and fields["noise_seed"] == "sc:Integer"


def test_clips_and_volumes_of_a_dataset_are_lossless(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "s", tmp_path / "cases")
    hf.export(clips, tmp_path / "clips", progress=False)
    rows = [json.loads(row) for row in (tmp_path / "clips/data/metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        frames, fps = read_video(tmp_path / "clips/data" / row["file_name"])
        assert np.array_equal(frames, read_video(clips / f"p10000032-{i}_000.avi")[0]) and fps == row["fps"] == 30.0
    hf.export(write_volumes(tmp_path / "v", hounsfield(), RAS), tmp_path / "volumes", progress=False)
    first = sorted((tmp_path / "volumes/data").glob("*.nii.gz"))[0]
    assert np.array_equal(np.asarray(nibabel.load(first).dataobj), hounsfield())  # type: ignore[attr-defined]
    assert impersonal(bytes_of(tmp_path / "clips")) and impersonal(bytes_of(tmp_path / "volumes"))
