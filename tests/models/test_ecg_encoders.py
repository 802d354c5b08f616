"""Published ECG encoders from a local folder: the input they want, unpooled tokens at their real seconds, clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medgen.data.ecg import ECG, LEADS, cut
from medgen.digital.ecg import simulate_ecg
from medgen.digital.rhythm import draw_rhythm
from medgen.models.ecg_encoders import (
    STMEM,
    ECGEncoder,
    ECGEncoderError,
    ECGInput,
    Net1D,
    PublishedECGEncoder,
    encode_span,
    fit_input,
    import_checkpoint,
    load_ecg_encoder,
)

SHAPES: dict[str, dict[str, Any]] = {
    "net1d": {"base_filters": 8, "filter_list": [8, 16, 16], "m_blocks_list": [1, 2, 1], "groups_width": 4},
    "st_mem": {"width": 16, "depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 16},
}


@pytest.fixture(scope="module")
def ecg() -> ECG:
    rhythm = draw_rhythm(1, "sinus", 75, 0.0, 20.0, 0.02)
    return simulate_ecg(rhythm, 1, start=0.0, end=20.0)[0]


@pytest.fixture(scope="module", params=["net1d", "st_mem"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PublishedECGEncoder:
    """A small network of the published kind, through a checkpoint file as its authors write them."""
    torch.manual_seed(0)
    model = PublishedECGEncoder(request.param, SHAPES[request.param])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    content = {f"module.{name}": value for name, value in model.network.state_dict().items()}
    folder = tmp_path_factory.mktemp("encoder")
    torch.save({"state_dict": {**content, "module.dense.weight": torch.ones(2, 2)}}, folder / "published.pth")
    return load_ecg_encoder(import_checkpoint(folder / "published.pth", request.param, folder, shape=SHAPES[request.param]))


def test_tokens_stand_at_their_seconds(encoder: PublishedECGEncoder, ecg: ECG) -> None:
    assert isinstance(encoder, ECGEncoder)
    found = encoder.encode(ecg, 10.0)
    step = encoder.network.samples_per_token / encoder.wants.rate
    assert found.tokens.shape == (len(found.times), encoder.width) and found.tokens.isfinite().all()
    moments = found.times.unique()
    torch.testing.assert_close(moments.diff(), torch.full_like(moments[1:], step), atol=1e-4, rtol=0)
    assert float(moments[0]) == pytest.approx(10 - encoder.wants.seconds / 2 + step / 2, abs=0.01)
    assert found.tokens.std(0).max() > 1e-3, "not pooled"


def test_a_later_part_gives_later_tokens(encoder: PublishedECGEncoder, ecg: ECG) -> None:
    moved = encoder.encode(replace(ecg, start=ecg.start + 100), 110.0)
    found = encoder.encode(ecg, 10.0)
    torch.testing.assert_close(moved.tokens, found.tokens)
    torch.testing.assert_close(moved.times, found.times + 100, atol=1e-3, rtol=0)


def test_a_change_in_the_signal_changes_the_tokens_there_most(encoder: PublishedECGEncoder, ecg: ECG) -> None:
    beat = ecg.signal.copy()
    beat[:, 6000:6100] *= -1  # second 12.0 to 12.2
    before, after = encoder.encode(ecg, 10.0), encoder.encode(replace(ecg, signal=beat), 10.0)
    change = (after.tokens - before.tokens).norm(dim=1)
    near = (before.times - 12.1).abs() < 0.4
    assert change[near].max() > 2 * change[(before.times - 12.1).abs() > 2].mean()


def test_order_rate_and_number_of_leads_are_put_right(encoder: PublishedECGEncoder, ecg: ECG) -> None:
    turned = ECG(ecg.signal[::-1].copy(), ecg.leads[::-1], ecg.rate)
    torch.testing.assert_close(encoder.encode(turned, 10.0).tokens, encoder.encode(ecg, 10.0).tokens)
    single = ECG(ecg.signal[1:2], ("II",), ecg.rate)
    if encoder.wants.missing == "leave_out":
        found = encoder.encode(single, 10.0)
        assert len(found.times) == encoder.network.moments(encoder.wants.samples)
    else:
        with pytest.raises(ECGEncoderError, match=r"needs the leads I, II.*unusable: I \(absent\)"):
            encoder.encode(single, 10.0)


def test_a_span_is_covered_once(encoder: PublishedECGEncoder, ecg: ECG) -> None:
    for first, last in ((5.0, 8.0), (2.0, 18.0)):
        times = encode_span(encoder, ecg, first, last).times
        step = encoder.network.samples_per_token / encoder.wants.rate
        moments = times.unique()
        assert first <= moments.min() < first + step and last - step < moments.max() <= last
        assert moments.diff().max() < 2 * step


def test_too_short_a_recording_is_refused(encoder: PublishedECGEncoder, ecg: ECG) -> None:
    with pytest.raises(ECGEncoderError, match=r"reads (10|9) s at a time, the ECG has 4 s"):
        encoder.encode(cut(ecg, 5.0, 4.0), 7.0)


def test_scales() -> None:
    rows = {scale: ECGInput(rate=250, samples=2250, band=(0.5, 40.0), scale=scale) for scale in ("record", "lead", "mv")}
    rhythm = draw_rhythm(1, "sinus", 75, 0.0, 10.0, 0.02)
    ecg, _ = simulate_ecg(rhythm, 1, start=0.0, end=10.0)
    values = {name: fit_input(ecg, 5.0, wants)[0] for name, wants in rows.items()}
    assert values["record"].std().item() == pytest.approx(1, abs=1e-3) and values["record"].std(1).std() > 0.05
    torch.testing.assert_close(values["lead"].std(1), torch.ones(12), atol=1e-2, rtol=0)
    assert 0.02 < values["mv"].std() < 0.6


def test_the_published_shapes() -> None:
    """Parameter counts of the papers' networks: 30 M and 85 M."""
    with torch.device("meta"):
        counts = {kind.__name__: sum(p.numel() for p in kind().parameters()) / 1e6 for kind in (Net1D, STMEM)}
    assert counts["STMEM"] == pytest.approx(85.2, abs=0.5)
    assert 28 < counts["Net1D"] < 33


def test_a_folder_that_is_none_and_weights_of_another(tmp_path: Path) -> None:
    with pytest.raises(ECGEncoderError, match="is not a folder of an ECG encoder"):
        load_ecg_encoder(tmp_path)
    with pytest.raises(ECGEncoderError, match="no architecture 'resnet'"):
        PublishedECGEncoder("resnet")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ECGEncoderError, match="does not hold the weights of this st_mem"):
        import_checkpoint(tmp_path / "other.pth", "st_mem", tmp_path, shape=SHAPES["st_mem"])
    PublishedECGEncoder("st_mem", SHAPES["st_mem"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "shape": {**SHAPES["st_mem"], "depth": 3}}))
    with pytest.raises(ECGEncoderError, match="weights are not those of its st_mem"):
        load_ecg_encoder(tmp_path)
    assert all("head" not in name for name in load_file(next(tmp_path.glob("*.safetensors"))))


def test_leads_have_the_usual_order() -> None:
    assert Net1D.wants.leads == STMEM.wants.leads == LEADS and np.isclose(Net1D.wants.seconds, 10)
