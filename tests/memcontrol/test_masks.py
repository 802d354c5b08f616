"""Every attention layer has a bit, and what is trained obeys the mask: weights, LoRA factors, biases and norms."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from medgen.config import ConfigError
from medgen.memcontrol.masks import (
    METHODS,
    Adaptation,
    Method,
    adapt,
    apply_difference,
    attention_layers,
    difference,
    merge_lora,
    trained_values,
)
from medgen.models.denoiser import SequenceTransformer

LAYERS = ("blocks.0.space", "blocks.0.cross", "blocks.1.space", "blocks.1.cross")


def transformer() -> SequenceTransformer:
    torch.manual_seed(0)
    model = SequenceTransformer(latent_channels=4, context_dim=16, width=16, depth=2, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)  # fmt: skip


def answer(model: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 1, 4, 8, 8, generator=draw), torch.randn(2, 3, 16, generator=draw)
    with torch.no_grad():
        found: torch.Tensor = model(latents, torch.full((2, 1), 0.5), torch.zeros(2, 1), context=context)
    return found


def test_every_attention_layer_has_a_bit() -> None:
    assert attention_layers(transformer()) == LAYERS
    # one down block, the middle, two layers of the up block: each with self- and cross-attention
    assert len(attention_layers(unet())) == 2 * (1 + 1 + 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [transformer, unet])
def test_what_is_closed_is_not_trained(method: Method, network: type[nn.Module]) -> None:
    model = network()
    every = attention_layers(model)
    chosen = every[1:2]
    trained = adapt(model, Adaptation(method=method, layers=chosen, rank=2))
    inside = [name for name in trained if any(name.startswith(f"{layer}.") for layer in every)]
    block = chosen[0].rpartition(".")[0]
    assert trained and all(name.startswith(f"{block}.") for name in trained)
    assert all(name.startswith(f"{chosen[0]}.") for name in inside)


def test_a_bias_outside_of_the_attention_layers_obeys_its_block() -> None:
    model = transformer()
    trained = adapt(model, Adaptation(method="bias", layers=("blocks.1.cross",)))
    assert set(trained) == {"blocks.1.cross.to_out.bias", "blocks.1.mlp.0.bias", "blocks.1.mlp.2.bias"}
    everything = adapt(model, Adaptation(method="bias"))
    assert "embed.bias" in everything and all(name.endswith("bias") for name in everything)


def test_full_fine_tuning_without_a_mask_trains_all() -> None:
    model = transformer()
    assert len(adapt(model, Adaptation(method="full"))) == len(list(model.parameters()))


def test_lora_merges_into_a_plain_network_that_answers_the_same() -> None:
    model = transformer()
    names = set(model.state_dict())
    adapt(model, Adaptation(method="lora", layers=LAYERS[:2], rank=2))
    with torch.no_grad():
        for value in trained_values(model):
            model.get_parameter(value).normal_(std=0.3)
    before = answer(model)
    assert not torch.allclose(before, answer(transformer()), atol=1e-3)
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(answer(model), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_saved_difference_brings_a_new_network_to_where_training_ended(method: Method) -> None:
    adaptation, model = Adaptation(method=method, layers=LAYERS[1:3], rank=2), transformer()
    adapt(model, adaptation)
    start = trained_values(model)
    with torch.no_grad():
        for name in start:
            model.get_parameter(name).add_(0.1)
    again = transformer()
    apply_difference(again, adaptation, difference(model, start))
    torch.testing.assert_close(answer(again), answer(model), atol=2e-3, rtol=0)  # kept in half precision
    with pytest.raises(ConfigError, match="another network or mask"):
        apply_difference(transformer(), Adaptation(method=method, layers=LAYERS[:1], rank=2), difference(model, start))


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no attention layer 'blocks.9.space'; it has blocks.0.space"):
        adapt(transformer(), Adaptation(layers=("blocks.9.space",)))
