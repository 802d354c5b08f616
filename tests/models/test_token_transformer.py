"""The denoiser on codes: shapes, what a hidden code says, and conditions that reach the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medgen.config import ConfigError
from medgen.diffusion.masked_tokens import hide, masked_loss
from medgen.models.denoiser import DenoiserConfig
from medgen.models.token_transformer import TokenTransformer, build_token_transformer


def tiny(**options: Any) -> TokenTransformer:
    torch.manual_seed(0)
    shape = {"codebook_size": 10, "codes_per_place": 2, "token_dim": 8, "context_dim": 6, "width": 16, "depth": 2, "heads": 2}
    return TokenTransformer(**{**shape, **options})


def codes() -> torch.Tensor:
    return torch.randint(10, (2, 3, 4, 4, 2), generator=torch.Generator().manual_seed(0))


def test_logits_for_every_code_and_none_for_the_hidden_one() -> None:
    model = tiny()
    logits = model(codes(), torch.rand(2, 3), torch.zeros(2, 3))
    assert logits.shape == (2, 3, 4, 4, 2, 10)
    assert model.mask_code == 10
    assert model(torch.full_like(codes(), 10), torch.ones(2, 3), torch.zeros(2, 3)).isfinite().all()


def test_it_learns_codes_that_follow_from_a_frame_feature() -> None:
    """Frame features say which code the whole frame shows; after a few steps the hidden codes are predicted from them."""
    model = tiny(feature_dim=1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    draws = torch.Generator().manual_seed(0)
    known = torch.zeros(8, 3, dtype=torch.bool)
    losses = []
    for _ in range(110):
        kind = torch.randint(2, (8, 3), generator=draws)
        truth = (3 + 4 * kind)[:, :, None, None, None].expand(8, 3, 2, 2, 2)
        inputs, levels, hidden = hide(truth, known, model.mask_code, draws)
        logits = model(inputs, levels, torch.arange(3.0).expand(8, 3), features=kind[..., None].float())
        loss = masked_loss(logits, truth, hidden)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 2 and losses[-1] < 0.3


def test_saved_and_started_from(tmp_path: Path) -> None:
    model = tiny(feature_dim=3)
    model.save_pretrained(tmp_path)
    dims = {"codebook_size": 10, "codes_per_place": 2, "context_dim": 6, "feature_dim": 3}
    again = build_token_transformer(DenoiserConfig(init_from=str(tmp_path), patch_size=1), 8, **dims)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="codebook_size=10, this recipe has 12"):
        build_token_transformer(DenoiserConfig(init_from=str(tmp_path), patch_size=1), 8, **{**dims, "codebook_size": 12})
    with pytest.raises(ConfigError, match="denoiser.patch_size: 2"):
        build_token_transformer(DenoiserConfig(patch_size=2), 8, **dims)
