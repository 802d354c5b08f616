"""Another site: other people and other pictures of the same diseases, for testing only, and site A stays what it always was."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.data.records import read_manifest
from medgen.digital.chest import draw_study, render, write_dataset
from medgen.digital.patient import Acquisition, Study, draw_acquisition, draw_patient
from medgen.digital.projection import develop
from medgen.digital.site import SITES

A, B = SITES["A"], SITES["B"]


def test_site_a_draws_the_people_and_films_it_always_drew():
    study = draw_study(7031, 3)
    drawn = repr((study.patient, study.findings, study.acquisitions))
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == "dab5f01206425fd2"


def test_a_films_tones_are_those_of_before_there_were_sites():
    thickness = torch.linspace(0, 7, 64 * 64).view(64, 64)
    film = develop(thickness, Acquisition("PA", seed=3))
    assert film[::16, 32].tolist() == pytest.approx([0.068384, 0.268898, 0.487208, 0.688699], abs=1e-6)


def test_nobody_is_a_patient_of_both_sites():
    here, there = ({draw_patient(7, i, site).patient_id for i in range(50)} for site in (A, B))
    assert not here & there


def test_people_at_b_are_older_and_deeper():
    here, there = ([draw_patient(7, i, site) for i in range(300)] for site in (A, B))
    assert np.mean([p.age for p in there]) > np.mean([p.age for p in here]) + 4
    assert np.mean([p.scale[0] for p in there]) > np.mean([p.scale[0] for p in here]) + 0.04


def test_six_in_ten_films_at_b_are_taken_at_the_bedside():
    views = [draw_study(7, i, site=B).acquisitions[0].view for i in range(400)]
    assert 0.53 < views.count("AP") / 400 < 0.67


def test_film_at_b_is_noisier_and_softer_than_the_same_body_at_a():
    body = draw_study(7, 1, ("AP",)).patient
    noise, edges = {}, {}
    for site in (A, B):
        # the same pose twice, with other noise (and another shutter, whose edges are cut off)
        poses = tuple(dataclasses.replace(draw_acquisition(1, "AP"), seed=seed, noise=0.004) for seed in (1, 2))
        one, two = (film.image[8:-8, 8:-8] for film in render(Study(body, "s", (), poses, site), 128))
        noise[site.name] = (one - two).std()
        mean = (one + two) / 2
        edges[site.name] = np.abs(np.diff(mean, axis=1)).max() / mean.std()
    assert noise["B"] > 1.2 * noise["A"]  # display noise alike: the rest is the detector's
    assert edges["B"] < 0.9 * edges["A"]


def test_edges_of_a_film_at_b_are_shuttered():
    film = render(draw_study(7, 2, ("PA",), site=B), 128)[0].image
    border = np.concatenate([film[0], film[-1], film[:, 0], film[:, -1]])
    assert (border == 0).mean() > 0.4
    assert (film[20:-20, 20:-20] > 0).all()


def test_data_set_of_b_is_for_testing_and_says_where_it_is_from(tmp_path: Path):
    manifest = read_manifest(write_dataset(tmp_path, n=3, seed=7, size=48, site="B", processes=1))
    assert [r.split for r in manifest.records] == ["test"] * 3
    assert len({r.patient_id for r in manifest.records}) == 3  # everyone is filmed once
    assert all(r.extra["site"] == "B" and r.extra["acquisition"]["view"] == r.view for r in manifest.records)
    assert '"site": "B"' in manifest.source
    with pytest.raises(ValueError, match="there are A, B"):
        write_dataset(tmp_path / "c", n=1, site="C")  # type: ignore[arg-type]
