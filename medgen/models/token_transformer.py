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

    The codes of one place are one token: the sum of their embeddings, and one prediction for each of them.
    The embedding is its own, `token_dim` wide, not the tokenizer's vectors: logits against a few dimensions of unit vectors could
    only favour codes that are alike, and what a hidden place may show is often one of two that are not.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 1024,
        codes_per_place: int = 1,
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
        cross_every: int = 1,
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
            cross_every=cross_every,
        )
        # One table for input and output; unit variance of a token's embedding, logits that start small.
        self.codes = nn.Parameter(torch.randn(codes_per_place, codebook_size + 1, token_dim) * codes_per_place**-0.5)
        self.to_books = nn.Linear(token_dim, codes_per_place * token_dim)
        self.bias = nn.Parameter(torch.zeros(codes_per_place, codebook_size))

    @property
    def mask_code(self) -> int:
        """The code of a hidden place."""
        return int(self.config.codebook_size)

    def set_attention_backend(self, backend: str | None) -> None:
        """As `SequenceTransformer.set_attention_backend`."""
        self.transformer.set_attention_backend(backend)

    def forward(self, codes: Tensor, levels: Tensor, times: Tensor, **conditions: Any) -> Tensor:
        """codes [B,T,*S,G] int64; levels (share that is hidden) and times [B,T]; further as `SequenceTransformer` → logits [B,T,*S,G,K]."""
        books = torch.arange(len(self.codes), device=codes.device)
        embedded = self.codes[books, codes].sum(-2)  # [B,T,*S,D]
        out = self.transformer(embedded.movedim(-1, 2), levels, times, **conditions).movedim(2, -1)
        out = self.to_books(out).unflatten(-1, (len(self.codes), -1)) * int(self.config.token_dim) ** -0.5
        return torch.einsum("...gd,gkd->...gk", out, self.codes[:, :-1]) + self.bias


def build_token_transformer(config: DenoiserConfig, token_dim: int, **dims: int) -> TokenTransformer:
    """A new model of `config`'s shape, or the trained one at `config.init_from`.

    `dims`: codebook_size and codes_per_place of the tokenizer, context_dim and feature_dim of the conditioner.
    """
    if config.patch_size != 1:
        raise ConfigError(f"denoiser.patch_size: {config.patch_size}; one place is one code, so it must be 1 here")
    if config.init_from is None:
        shape = config.model_dump(exclude={"init_from", "patch_size"})
        try:
            return TokenTransformer(token_dim=token_dim, **dims, **shape)
        except ValueError as error:
            raise ConfigError(f"denoiser: {error}") from None
    model = TokenTransformer.from_pretrained(component(config.init_from, "denoiser"), torch_dtype=torch.float32)
    for name, needed in dims.items():
        if model.config[name] != needed:
            raise ConfigError(f"denoiser.init_from: {config.init_from} has {name}={model.config[name]}, this recipe has {needed}")
    return model
