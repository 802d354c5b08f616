"""What of a denoiser is trained: a method of parameter-efficient fine-tuning under a mask with one bit for each attention layer.

The mask decides for every parameter. Inside an attention layer its own bit counts; what else a transformer block holds (MLP, norms,
adaLN tables) is trained where one of the block's layers is open; what lies outside of all blocks only where every layer is open.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention as DiffusersAttention
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.models.adopted import AdoptedDenoiser, DenoiserWithText
from medgen.models.attention import Attention

Method = Literal["full", "attention", "lora", "bias", "norm"]
METHODS: tuple[Method, ...] = get_args(Method)
_ATTENTION = (Attention, DiffusersAttention, AttentionModuleMixin)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
_TABLES = ("table", "scale_shift_table")  # adaLN's shift, scale and gate: the affine part of norms that have none of their own


class Adaptation(Config):
    """What is trained: everything ("full"), attention layers, LoRA factors of them, biases, or norms; only where the mask is open."""

    method: Method = "lora"
    layers: tuple[str, ...] | None = Field(None, description="names of the open attention layers; all of them if not given")
    rank: int = Field(8, ge=1, description="of LoRA")


def network_of(model: nn.Module) -> nn.Module:
    """The network that has the attention layers: without a text encoder beside it or an adopting call around it."""
    denoiser = model.denoiser if isinstance(model, DenoiserWithText) else model
    return denoiser.network if isinstance(denoiser, AdoptedDenoiser) else denoiser


def attention_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the attention layers in the network's order: the bits of a mask. Raises `ConfigError` if there is none."""
    names = tuple(name for name, module in network.named_modules() if isinstance(module, _ATTENTION))
    if not names:
        raise ConfigError(f"{type(network).__name__} has no attention layer, so there is nothing to mask")
    return names


def adapt(network: nn.Module, adaptation: Adaptation) -> list[str]:
    """Make exactly what `adaptation` says trainable, in place (LoRA layers are added); the names of the trained parameters.

    Raises `ConfigError` for a layer that the network does not have, and where nothing would be trained.
    """
    every = attention_layers(network)
    layers = every if adaptation.layers is None else adaptation.layers
    if unknown := [name for name in layers if name not in every]:
        raise ConfigError(f"the network has no attention layer {unknown[0]!r}; it has {', '.join(every)}")
    network.requires_grad_(False)
    if adaptation.method == "lora":
        _add_lora(network, layers, adaptation.rank)
    else:
        chosen = _of_method(network, adaptation.method)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen and is_open(name, layers, every))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"nothing to train: method {adaptation.method!r} finds no parameter in the {len(layers)} open layers")
    return trained


def is_open(parameter: str, layers: Iterable[str], every: Iterable[str]) -> bool:
    """Whether a mask with `layers` open, of `every` attention layer, leaves the parameter of this name open."""
    layers, every = set(layers), set(every)
    inside = [name for name in every if parameter.startswith(f"{name}.")]
    if inside:
        return max(inside, key=len) in layers
    blocks = {name.rpartition(".")[0] for name in every}
    around = [block for block in blocks if block and parameter.startswith(f"{block}.")]
    if around:
        block = max(around, key=len)
        return any(name.rpartition(".")[0] == block for name in layers)
    return layers == every


def merge_lora(network: nn.Module) -> nn.Module:
    """`network` with its LoRA factors added to the weights they adapt, and without any LoRA layer; in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
    return network


def trained_values(network: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, by name."""
    return {name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad}


def difference(network: nn.Module, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training changed since `start`, in half precision; of LoRA factors their values (a start of theirs was random)."""
    return {
        name: (value if _is_lora(name) else value - start[name]).half().cpu() for name, value in trained_values(network).items()
    }


@torch.no_grad()
def apply_difference(network: nn.Module, adaptation: Adaptation, change: dict[str, Tensor]) -> None:
    """Bring the network that a fine-tuning started from to where it ended. Raises `ConfigError` for another network's change."""
    adapt(network, adaptation)
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    if wrong := sorted(parameters.keys() ^ change.keys()):
        raise ConfigError(f"these weights are of another network or mask: {', '.join(wrong[:3])} ({len(wrong)} names differ)")
    for name, value in parameters.items():
        moved = change[name].to(value.device, value.dtype)
        value.copy_(moved if _is_lora(name) else value + moved)


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _add_lora(network: nn.Module, layers: Iterable[str], rank: int) -> None:
    """LoRA (Hu 2021) on every linear map of the open layers: query, key, value and output."""
    targets = [
        f"{layer}.{name}"
        for layer in layers
        for name, module in network.get_submodule(layer).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if targets:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, bias="none"), network)


def _of_method(network: nn.Module, method: Method) -> set[str]:
    """Names of the parameters that `method` would train without a mask."""
    names = {name for name, _ in network.named_parameters()}
    if method == "full":
        return names
    if method == "attention":
        inside = tuple(f"{layer}." for layer in attention_layers(network))
        return {name for name in names if name.startswith(inside)}
    if method == "bias":  # BitFit (Ben Zaken 2022)
        return {name for name in names if name.rpartition(".")[2] == "bias"}
    norms = {
        prefix for prefix, module in network.named_modules() if isinstance(module, _NORMS) or "RMSNorm" in type(module).__name__
    }
    return {name for name in names if name.rpartition(".")[0] in norms or name.rpartition(".")[2] in _TABLES}
