"""`TokenTransformer`: the one denoiser on codes instead of latents. Hidden codes in, logits over the codebook out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from medgen.config import ConfigError
from medgen.models.denoiser import DenoiserConfig, SequenceTransformer
from medgen.models.folders import component


class TokenTransformer(ModelMixin, ConfigMixin):
    """A `SequenceTransformer` between an embedding of the codes and a comparison with it; code `codebook_size` is a hidden one.

    The embedding is its own, `token_dim` wide, not the tokenizer's vectors: logits against a few dimensions of unit vectors could
    only favour codes that are alike, and what a hidden place may show is often one of two that are not.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 1024,
        token_dim: int = 128,
        context_dim: int = 128,
        spatial_dims: int = 2,
        width: int = 192,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        temporal_every: int = 1,
        modulation: str = "single",
        time_periods: tuple[float, float] = (0.1, 20.0),
        feature_dim: int = 0,
    ) -> None:
        super().__init__()
        self.transformer = SequenceTransformer(
            latent_channels=token_dim,
            context_dim=context_dim,
            spatial_dims=spatial_dims,
            patch_size=1,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            temporal_every=temporal_every,
            modulation=modulation,
            time_periods=time_periods,
            feature_dim=feature_dim,
        )
        self.codes = nn.Embedding(codebook_size + 1, token_dim)
        nn.init.normal_(self.codes.weight, std=token_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(codebook_size))

    @property
    def mask_code(self) -> int:
        """The code of a hidden place."""
        return int(self.config.codebook_size)

    def set_attention_backend(self, backend: str | None) -> None:
        """As `SequenceTransformer.set_attention_backend`."""
        self.transformer.set_attention_backend(backend)

    def forward(self, codes: Tensor, levels: Tensor, times: Tensor, **conditions: Any) -> Tensor:
        """codes [B,T,*S] int64; levels (share that is hidden) and times [B,T]; further as `SequenceTransformer` → logits [B,T,*S,K]."""
        scale = int(self.config.token_dim) ** 0.5  # unit variance in; logits that start small
        out = self.transformer(scale * self.codes(codes).movedim(-1, 2), levels, times, **conditions)
        return out.movedim(2, -1) @ self.codes.weight[:-1].T + self.bias


def build_token_transformer(config: DenoiserConfig, token_dim: int, codebook_size: int, **dims: int) -> TokenTransformer:
    """A new model of `config`'s shape, or the trained one at `config.init_from`. `dims`: context_dim, feature_dim."""
    if config.patch_size != 1:
        raise ConfigError(f"denoiser.patch_size: {config.patch_size}; one place is one code, so it must be 1 here")
    if config.init_from is None:
        shape = config.model_dump(exclude={"init_from", "patch_size"})
        try:
            return TokenTransformer(codebook_size, token_dim, **dims, **shape)
        except ValueError as error:
            raise ConfigError(f"denoiser: {error}") from None
    model = TokenTransformer.from_pretrained(component(config.init_from, "denoiser"), torch_dtype=torch.float32)
    for name, needed in {"codebook_size": codebook_size, **dims}.items():
        if model.config[name] != needed:
            raise ConfigError(f"denoiser.init_from: {config.init_from} has {name}={model.config[name]}, this recipe has {needed}")
    return model
