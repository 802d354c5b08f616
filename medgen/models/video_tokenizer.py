"""`VideoTokenizer`: a video as a short sequence of codes, causal in time; what masked-token generation works on.

After C-ViViT (Villegas 2023: Phenaki) as ECHOPulse uses it, with a cosine-similarity codebook (Yu 2022: ViT-VQGAN).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medgen.config import Config, ConfigError
from medgen.models.attention import POSITION_CHANNELS, Attention, grid_angles, grid_positions, time_angles
from medgen.models.folders import component

_TIME_PERIODS = (2.0, 200.0)  # of the rotary positions in time, in token frames


class VideoTokenizerConfig(Config):
    """The shape of a `VideoTokenizer`: patches of `patch_size` pixels; the first frame alone, then `frames_per_token` together."""

    init_from: str | None = Field(None, description="folder of a trained tokenizer or its pipeline to start from")
    patch_size: int = Field(16, ge=1)
    frames_per_token: int = Field(2, ge=1)
    width: int = Field(192, ge=8)
    depth: int = Field(4, ge=1, description="blocks of the encoder, and of the decoder")
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    memory: int = Field(4, ge=1, description="token frames that one block's attention in time sees: its own and those before it")
    codes_per_place: int = Field(1, ge=1, description="each from a codebook of its own: more detail in no more tokens")
    code_dim: int = Field(16, ge=2)
    codebook_size: int = Field(1024, ge=2)
    decay: float = Field(0.95, gt=0, lt=1, description="of the running means that the codes are")
    revive_below: float = Field(0.1, ge=0, lt=1, description="a code used less than this share of the average is replaced")


@dataclass
class TokenizedVideo(BaseOutput):
    """`video` [B,T,1,H,W] reconstructed, `codes` [B,T',h,w,G]; scalars: `commitment` loss, `perplexity` of the batch's codes."""

    video: Tensor
    codes: Tensor
    commitment: Tensor
    perplexity: Tensor


class VideoTokenizer(ModelMixin, ConfigMixin):
    """Videos [B,T,1,H,W] in [-1,1] ↔ codes [B,T',h,w,G] int64, T' = 1 + ceil((T - 1) / frames_per_token), h = H / patch_size.

    Each place has G = `codes_per_place` codes, each from a codebook of its own (product quantisation, Jégou 2011).
    Causal in both directions: codes of a frame do not depend on later frames, pixels of a frame not on later codes. So a single
    image has codes (those of a video's first frame), and appended codes leave what is decoded already as it is.
    """

    _no_split_modules = ["_Block"]  # noqa: RUF012 - as in diffusers

    @register_to_config
    def __init__(
        self,
        patch_size: int = 16,
        frames_per_token: int = 2,
        width: int = 192,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        memory: int = 4,
        codes_per_place: int = 1,
        code_dim: int = 16,
        codebook_size: int = 1024,
        decay: float = 0.95,
        revive_below: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 4:
            raise ValueError(f"width {width} / heads {heads} must be a whole multiple of 4 (2 per spatial axis)")
        area = patch_size**2
        self.embed_first, self.embed_later = nn.Linear(area, width), nn.Linear(frames_per_token * area, width)
        self.encoder = _Tower(width, depth, heads, mlp_ratio, memory)
        self.to_code = nn.Linear(width, codes_per_place * code_dim)
        self.quantizer = CosineQuantizer(codes_per_place, codebook_size, code_dim, decay, revive_below)
        self.from_code = nn.Linear(codes_per_place * code_dim, width)
        self.decoder = _Tower(width, depth, heads, mlp_ratio, memory)
        self.first_pixels, self.later_pixels = nn.Linear(width, area), nn.Linear(width, frames_per_token * area)

    @torch.no_grad()
    def start_from(self, videos: Tensor) -> None:
        """Begin as a linear tokenizer: principal components of the patches of `videos` [B,T,1,H,W], T > 1, spread over the codes.

        Blocks begin as the identity, so training starts from pictures rather than from noise. The last number of every code is left
        constant: the direction then also says how far the others are from 0.
        """
        groups, dim = self.quantizer.codebook.shape[0], self.quantizer.codebook.shape[2]
        for layer in (self.to_code, self.from_code):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        first, later = self._patches(videos)
        used = min(groups * (dim - 1), int(self.config.width), first.shape[-1])
        for patches, embed, pixels in (
            (first, self.embed_first, self.first_pixels),
            (later, self.embed_later, self.later_pixels),
        ):
            rows = patches.flatten(0, 3).float()
            mean = rows.mean(0)
            variance, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
            count = min(embed.out_features, len(variance))
            basis, spread = vectors.flip(1)[:, :count], variance.flip(0)[:count].clamp(min=1e-6)
            # Component j goes to code j % groups: every code gets large and small ones, all on one scale, that of their sum.
            scale = torch.stack([spread[i % groups : used : groups].sum() for i in range(count)]).clamp(min=1e-6).sqrt()
            for layer in (embed, pixels):
                nn.init.zeros_(layer.weight)
            embed.weight[:count] = (basis / scale).T
            embed.bias.copy_(-(embed.weight @ mean))
            pixels.weight[:, :count] = basis * scale
            pixels.bias.copy_(mean)
        index = torch.arange(used, device=self.to_code.weight.device)
        places = index % groups * dim + index // groups
        self.to_code.weight[places, index] = 1.0
        self.to_code.bias[dim - 1 :: dim] = 1.0
        self.from_code.weight[index, places] = 2**0.5  # of a direction (c, 1) / |(c, 1)| with |c| near 1

    def token_frames(self, frames: int) -> int:
        """T' of a video of `frames` frames."""
        return 1 + -(-(frames - 1) // int(self.config.frames_per_token))

    def frames(self, token_frames: int) -> int:
        """The frames that `token_frames` decode to."""
        return 1 + (token_frames - 1) * int(self.config.frames_per_token)

    def encode(self, videos: Tensor) -> Tensor:
        """Codes [B,T',h,w,G] of `videos` [B,T,1,H,W]; the last token frame may be filled up with repetitions of the last frame."""
        return self.quantizer.nearest(self._directions(videos))

    def decode(self, codes: Tensor, frames: int | None = None) -> Tensor:
        """Videos [B,T,1,H,W] of `codes` [B,T',h,w,G]: all that they decode to, or the first `frames`. Values are not clamped."""
        return self._decode(self.quantizer.vectors(codes), frames)

    def forward(self, videos: Tensor) -> TokenizedVideo:
        """Reconstruct `videos` [B,T,1,H,W] in [-1,1]; in training mode the codebook learns too."""
        directions = self._directions(videos)
        codes = self.quantizer.nearest(directions)
        quantized = self.quantizer.vectors(codes)
        commitment = (1 - (directions * quantized).sum(-1)).mean()
        if self.training:
            self.quantizer.learn(directions, codes)
        through = directions + (quantized - directions).detach()  # straight through: the gradient as if nothing were rounded
        video = self._decode(through, videos.shape[1])
        return TokenizedVideo(video, codes, commitment, self.quantizer.perplexity(codes))

    def _directions(self, videos: Tensor) -> Tensor:
        """Unit vectors [B,T',h,w,G,d], before rounding to codes."""
        first, later = self._patches(videos)
        x = torch.cat([self.embed_first(first), self.embed_later(later)], dim=1)
        groups = int(self.config.codes_per_place)
        return functional.normalize(self.to_code(self.encoder(x)).float().unflatten(-1, (groups, -1)), dim=-1)

    def _patches(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """[B,1,h,w,p*p] of the first frame and [B,T'-1,h,w,span*p*p] of the later ones."""
        patch, span = int(self.config.patch_size), int(self.config.frames_per_token)
        frames, channels, height, width = videos.shape[1:]
        if channels != 1 or height % patch or width % patch:
            raise ValueError(
                f"videos of shape {tuple(videos.shape)}: expected [B, T, 1, H, W] with sides that are multiples of {patch}"
            )
        missing = (1 - frames) % span
        if missing:
            videos = torch.cat([videos, videos[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        places = functional.pixel_unshuffle(videos, patch).permute(0, 1, 3, 4, 2)
        return places[:, :1], places[:, 1:].unflatten(1, (-1, span)).permute(0, 1, 3, 4, 2, 5).flatten(4)

    def _decode(self, vectors: Tensor, frames: int | None) -> Tensor:
        patch, span = int(self.config.patch_size), int(self.config.frames_per_token)
        x = self.decoder(self.from_code(vectors.flatten(-2).to(self.from_code.weight.dtype)))
        later = self.later_pixels(x[:, 1:]).unflatten(4, (span, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        places = torch.cat([self.first_pixels(x[:, :1]), later], dim=1)  # [B,T,h,w,p*p]
        return functional.pixel_shuffle(places.permute(0, 1, 4, 2, 3), patch)[:, :frames]


class CosineQuantizer(nn.Module):
    """Unit vectors as codes, G books of K. A code is the direction of the running mean of what chose it; a dead one is replaced.

    All its state is buffers, so that a checkpoint holds it and a step that is not applied can be taken back. (MONAI's EMAQuantizer
    keeps its codes as a frozen parameter, is Euclidean and lets codes die; vector-quantize-pytorch asks for four more packages.)
    """

    codebook: Tensor
    sums: Tensor
    usage: Tensor

    def __init__(self, groups: int, size: int, dim: int, decay: float, revive_below: float) -> None:
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("codebook", functional.normalize(torch.randn(groups, size, dim), dim=-1))
        self.register_buffer("sums", torch.zeros(groups, size, dim))
        self.register_buffer("usage", torch.zeros(groups, size))  # vectors per step; 0: the first batch replaces every code

    def nearest(self, directions: Tensor) -> Tensor:
        """Codes [...,G] int64 of unit vectors [...,G,d]."""
        return torch.einsum("...gd,gkd->...gk", directions.detach(), self.codebook).argmax(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Unit vectors [...,G,d] of codes [...,G]."""
        return self.codebook[torch.arange(len(self.codebook), device=codes.device), codes]

    def perplexity(self, codes: Tensor) -> Tensor:
        """How many codes of a book are in use, weighted: exp of the entropy of `codes` [...,G], mean over books; from 1 to K."""
        share = self._one_hot(codes).mean(1)
        return torch.special.entr(share).sum(-1).exp().mean()

    @torch.no_grad()
    def learn(self, directions: Tensor, codes: Tensor) -> None:
        """Move the codes to the running means (van den Oord 2017, appendix A.1) and replace the dead. Draws from the global generator."""
        vectors, one_hot = directions.detach().flatten(0, -3).transpose(0, 1), self._one_hot(codes)  # [G,N,d], [G,N,K]
        # A product instead of index_add_: the same sum in the same order on every device.
        counts, sums = one_hot.sum(1), one_hot.transpose(1, 2) @ vectors
        candidates = vectors[:, torch.randint(vectors.shape[1], (self.usage.shape[1],), device=vectors.device)]
        if dist.is_available() and dist.is_initialized():
            candidates = candidates.contiguous()
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            dist.broadcast(candidates, 0)
        self.usage.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        average = counts.sum(1, keepdim=True) / counts.shape[1]
        dead = self.usage < self.revive_below * average
        # A new code starts as if it were used half the average: long enough to be found, not for ever if nobody does.
        self.usage.copy_(torch.where(dead, average / 2, self.usage))
        self.sums.copy_(torch.where(dead[..., None], candidates * average[..., None] / 2, self.sums))
        self.codebook.copy_(functional.normalize(self.sums, dim=-1))

    def _one_hot(self, codes: Tensor) -> Tensor:
        """[G,N,K] float of N x G codes [...,G]."""
        return functional.one_hot(codes.flatten(0, -2).T, self.usage.shape[1]).to(self.usage.dtype)


class _Tower(nn.Module):
    """Blocks of attention in space and causal attention in time on [B,T,h,w,W], any h, w and T."""

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, memory: int) -> None:
        super().__init__()
        self.heads, self.memory = heads, memory
        self.embed_position = nn.Linear(2 * POSITION_CHANNELS, width, bias=False)
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_ratio) for _ in range(depth))
        nn.init.zeros_(self.embed_position.weight)

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width, channels = x.shape[1:]
        head = channels // self.heads
        x = x.flatten(2, 3) + self.embed_position(grid_positions((height, width), x))  # [B,T,S,W]
        space = grid_angles((height, width), head, x.device)
        index = torch.arange(frames, device=x.device)
        time = time_angles(index[None], head // 4 * 2, *_TIME_PERIODS)
        seen = _causal(frames, self.memory, x.device)
        for block in self.blocks:
            x = block(x, space, time, seen)
        return x.unflatten(2, (height, width))


class _Block(nn.Module):
    """Attention among the places of a frame, attention of each place on its own past, MLP; pre-norm; the identity at first."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.space, self.time = Attention(width, heads), Attention(width, heads)
        last = nn.Linear(hidden, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), last)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        for layer in (self.space.to_out, self.time.to_out, last):  # begins as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, space: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """x [B,T,S,W]; rotary angles of places and of frames; seen [1,T,T] bool → [B,T,S,W]."""
        batch, frames, places, _ = x.shape
        x = x + self.space(self.norms[0](x).flatten(0, 1), rotary=space).unflatten(0, (batch, frames))
        series = self.norms[1](x).transpose(1, 2).flatten(0, 1)  # [B*S,T,W]
        x = x + self.time(series, rotary=time, mask=seen).unflatten(0, (batch, places)).transpose(1, 2)
        return x + self.mlp(self.norms[2](x))


@lru_cache(maxsize=16)
def _causal(frames: int, memory: int, device: torch.device) -> Tensor:
    """[1,T,T] bool: frame i sees i - memory < j <= i. A limited view makes frame 100 as ordinary as frame 10."""
    index = torch.arange(frames, device=device)
    behind = index[:, None] - index
    return ((behind >= 0) & (behind < memory))[None]


def build_video_tokenizer(config: VideoTokenizerConfig) -> VideoTokenizer:
    """A new tokenizer, or the trained one at `config.init_from` (whose shape then counts)."""
    if config.init_from is not None:
        return VideoTokenizer.from_pretrained(component(config.init_from, "tokenizer"), dtype=torch.float32)
    try:
        return VideoTokenizer(**config.model_dump(exclude={"init_from"}))
    except ValueError as error:
        raise ConfigError(f"tokenizer: {error}") from None


def load_video_tokenizer(path: str | Path) -> VideoTokenizer:
    """The trained tokenizer at `path` (its folder, or a pipeline that has one), frozen, in evaluation mode and float32."""
    model = VideoTokenizer.from_pretrained(component(path, "tokenizer"), dtype=torch.float32)
    return model.requires_grad_(False).eval()
