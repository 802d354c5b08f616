"""Published ECG encoders from a local folder, as tokens at their real seconds: ECGFounder (Net1D) and ST-MEM (a masked ViT).

A folder is that of a diffusers model (config.json, safetensors) with the published weights under their own names;
`import_checkpoint` makes one from a .pth file. Networks are written from the papers' descriptions: ECGFounder (Li 2025,
after Hong 2020's Net1D), ST-MEM (Na 2024). Both were trained to be pooled; here their last features are kept apart, one per moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medgen.config import Config
from medgen.data.ecg import ECG, LEADS, ECGPreparation, filter_ecg
from medgen.models.folders import component


class ECGEncoderError(ValueError):
    """An encoder folder or an input that cannot be used; the message says what was expected."""


class ECGInput(Config):
    """What an encoder was trained on; every ECG is brought to it, or refused."""

    leads: tuple[str, ...] = Field(LEADS, description="order of the rows")
    rate: float = Field(..., gt=0, description="samples per second")
    samples: int = Field(..., gt=0, description="length of the input")
    band: tuple[float, float] = Field(..., description="band-pass, Hz")
    scale: Literal["record", "lead", "mv"] = Field(
        "record", description="z-score of all leads together, of each, or mV as they are"
    )
    missing: Literal["refuse", "leave_out"] = Field("refuse", description="whether it can do with fewer leads")

    @property
    def seconds(self) -> float:
        """How long the input is."""
        return self.samples / self.rate


@dataclass(frozen=True)
class ECGTokens:
    """`tokens` [N,D] with the second `times` [N] at the middle of what each of them stands for, on the ECG's own clock."""

    tokens: Tensor
    times: Tensor


@runtime_checkable
class ECGEncoder(Protocol):
    """Anything that turns an ECG into unpooled tokens."""

    wants: ECGInput
    width: int

    def encode(self, ecg: ECG, middle: float) -> ECGTokens:
        """Tokens of `wants.seconds` of `ecg` around second `middle` of its clock. Raises `ECGEncoderError` where it does not fit."""
        ...


def encode_span(encoder: ECGEncoder, ecg: ECG, first: float, last: float) -> ECGTokens:
    """Tokens whose moments lie between seconds `first` and `last` of the ECG's clock, from as few windows as cover them."""
    count = max(1, math.ceil((last - first) / encoder.wants.seconds))
    step = (last - first) / count
    parts = []
    for i in range(count):
        begin, end = first + i * step, first + (i + 1) * step
        found = encoder.encode(ecg, (begin + end) / 2)
        inside = (found.times >= begin) & ((found.times < end) | (i == count - 1) & (found.times <= end))
        parts.append((found.tokens[inside], found.times[inside]))
    return ECGTokens(torch.cat([tokens for tokens, _ in parts]), torch.cat([times for _, times in parts]))


class PublishedECGEncoder(ModelMixin, ConfigMixin):
    """One of `ARCHITECTURES` with what it wants to read; `input` changes what differs from the published training."""

    @register_to_config
    def __init__(
        self, architecture: str = "net1d", shape: dict[str, Any] | None = None, input: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ECGEncoderError(f"no architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
        kind = ARCHITECTURES[architecture]
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in (shape or {}).items()
        }
        try:
            self.network = kind(**given)
            self.wants = ECGInput.model_validate({**kind.wants.model_dump(), **(input or {})})
        except (TypeError, ValueError) as error:
            raise ECGEncoderError(f"{architecture}: shape {shape} or input {input} cannot be: {error}") from None
        self.width = self.network.width

    @torch.no_grad()
    def encode(self, ecg: ECG, middle: float) -> ECGTokens:
        """See `ECGEncoder.encode`."""
        signal, leads, start = fit_input(ecg, middle, self.wants)
        tokens: Tensor = self.network(signal[None].to(self.device, self.dtype), leads)[0]
        step = self.network.samples_per_token / self.wants.rate
        # A token speaks for the samples it was made from; one of several rows (leads) for each moment is kept apart.
        moments = start + (torch.arange(self.network.moments(self.wants.samples)) + 0.5) * step
        return ECGTokens(tokens.float().cpu(), moments.repeat(len(tokens) // len(moments)))


def fit_input(ecg: ECG, middle: float, wants: ECGInput) -> tuple[Tensor, list[int], float]:
    """The rows that `wants` asks for [L,S], which of its leads they are, and the second of sample 0.

    The window is moved inside the recording where it would reach beyond an end. Raises `ECGEncoderError` where the recording is
    too short, or leads are missing that the encoder cannot do without.
    """
    if ecg.seconds < wants.seconds - 1 / ecg.rate:
        raise ECGEncoderError(f"the encoder reads {wants.seconds:g} s at a time, the ECG has {ecg.seconds:g} s")
    ready, quality, _ = filter_ecg(ecg, ECGPreparation(rate=wants.rate, band=wants.band))
    there = [i for i, name in enumerate(wants.leads) if name in ready.leads]
    if len(there) < len(wants.leads) and wants.missing == "refuse":
        lost = [f"{name} ({quality.get(name, 'absent')})" for name in wants.leads if name not in ready.leads]
        raise ECGEncoderError(f"the encoder needs the leads {', '.join(wants.leads)}; unusable: {', '.join(lost)}")
    total = ready.signal.shape[1]
    first = min(max(0, round((middle - wants.seconds / 2 - ready.start) * wants.rate)), max(0, total - wants.samples))
    rows = torch.from_numpy(ready.signal[[ready.leads.index(wants.leads[i]) for i in there]])[:, first : first + wants.samples]
    rows = functional.pad(rows, (0, wants.samples - rows.shape[1]))  # a sample or two of rounding
    if not bool(rows.isfinite().all()):
        raise ECGEncoderError("a part of the ECG was not recorded there; the encoder knows no gaps")
    if wants.scale != "mv":
        axes = (0, 1) if wants.scale == "record" else (1,)
        rows = (rows - rows.mean(axes, keepdim=True)) / (rows.std(axes, keepdim=True, correction=0) + 1e-8)
    return rows, there, ready.start + first / wants.rate


class Net1D(nn.Module):
    """ECGFounder's network: grouped bottleneck convolutions with squeeze-and-excitation, halved in time by every stage."""

    wants: ClassVar[ECGInput] = ECGInput(rate=500, samples=5000, band=(0.5, 40.0))

    def __init__(
        self,
        in_channels: int = 12,
        base_filters: int = 64,
        filter_list: tuple[int, ...] = (64, 160, 160, 400, 400, 1024, 1024),
        m_blocks_list: tuple[int, ...] = (2, 2, 2, 3, 3, 4, 4),
        kernel_size: int = 16,
        groups_width: int = 16,
        ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.first_conv = _SameConv(in_channels, base_filters, kernel_size, 2)
        stages, width = [], base_filters
        for number, (out, blocks) in enumerate(zip(filter_list, m_blocks_list, strict=True)):
            made = [
                _NetBlock(width if i == 0 else out, out, int(out * ratio), kernel_size, 2 if i == 0 else 1, out // groups_width,
                          first=number == 0 and i == 0)
                for i in range(blocks)
            ]  # fmt: skip
            stages.append(_Stage(made))
            width = out
        self.stage_list = nn.ModuleList(stages)
        self.width, self.samples_per_token = width, 2 ** (1 + len(stages))

    def moments(self, samples: int) -> int:
        """Tokens of an input of `samples`."""
        return -(-samples // self.samples_per_token)

    def forward(self, signal: Tensor, leads: list[int]) -> Tensor:
        """[B,12,S] → [B,N,D]; `leads` is all of them (its input specification refuses fewer)."""
        x = functional.silu(self.first_conv(signal))
        for stage in self.stage_list:
            x = stage(x)
        return x.transpose(1, 2)


class _Stage(nn.Module):
    """Blocks under the name that published weights use."""

    def __init__(self, blocks: list[_NetBlock]) -> None:
        super().__init__()
        self.block_list = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block_list:
            x = block(x)
        return x


class _SameConv(nn.Module):
    """Convolution to ceil(S / stride) samples, padded as TensorFlow does (one more on the right)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        stride, length = self.conv.stride[0], x.shape[-1]
        missing = max(0, (-(-length // stride) - 1) * stride + self.conv.kernel_size[0] - length)
        padded: Tensor = self.conv(functional.pad(x, (missing // 2, missing - missing // 2)))
        return padded


class _NetBlock(nn.Module):
    """1x1, grouped, 1x1 convolutions, each after a swish; squeeze-and-excitation; a pooled and zero-padded shortcut."""

    def __init__(self, channels: int, out: int, middle: int, kernel: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        self.conv1 = _SameConv(channels, middle, 1, 1)
        self.conv2 = _SameConv(middle, middle, kernel, stride, groups)
        self.conv3 = _SameConv(middle, out, 1, 1)
        self.se_fc1, self.se_fc2 = nn.Linear(out, out // 2), nn.Linear(out // 2, out)
        self.stride, self.first, self.wider = stride, first, out - channels
        self.shrinks = stride > 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x if self.first else functional.silu(x))
        y = self.conv3(functional.silu(self.conv2(functional.silu(y))))
        gate = torch.sigmoid(self.se_fc2(functional.silu(self.se_fc1(y.mean(-1)))))
        if self.shrinks:
            missing = self.stride - 1
            x = functional.max_pool1d(functional.pad(x, (missing // 2, missing - missing // 2)), self.stride)
        x = functional.pad(x, (0, 0, self.wider // 2, self.wider - self.wider // 2))
        return y * gate[..., None] + x


class STMEM(nn.Module):
    """ST-MEM's encoder: a transformer over patches of every lead, with separators between the leads."""

    wants: ClassVar[ECGInput] = ECGInput(rate=250, samples=2250, band=(0.67, 40.0), missing="leave_out")

    def __init__(
        self, seq_len: int = 2250, patch_size: int = 75, num_leads: int = 12, width: int = 768, depth: int = 12, heads: int = 12,
        dim_head: int = 64, mlp_dim: int = 3072, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.samples_per_token, self.depth = width, patch_size, depth
        # Published weights count the (weightless) rearrangement before these three as layer 0.
        self.to_patch_embedding = nn.Sequential(
            nn.Identity(), nn.LayerNorm(patch_size), nn.Linear(patch_size, width), nn.LayerNorm(width)
        )
        self.pos_embedding = nn.Parameter(torch.zeros(1, seq_len // patch_size + 2, width))
        self.sep_embedding = nn.Parameter(torch.zeros(width))
        self.lead_embeddings = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(num_leads))
        for i in range(depth):
            self.add_module(f"block{i}", _ViTBlock(width, heads, dim_head, mlp_dim, qkv_bias))
        self.norm = nn.LayerNorm(width)

    def moments(self, samples: int) -> int:
        """Tokens of each lead."""
        return samples // self.samples_per_token

    def forward(self, signal: Tensor, leads: list[int]) -> Tensor:
        """[B,L,S] of the leads numbered `leads` → [B,L*N,D], lead by lead."""
        patches = self.to_patch_embedding(signal.unflatten(-1, (-1, self.samples_per_token)))  # [B,L,N,D]
        batch, rows, count, _ = patches.shape
        place = self.pos_embedding[:, None]
        ends = self.sep_embedding.expand(batch, rows, 1, -1)
        x = torch.cat([ends + place[:, :, :1], patches + place[:, :, 1 : count + 1], ends + place[:, :, -1:]], dim=2)
        x = (x + torch.stack([self.lead_embeddings[i] for i in leads])[:, None]).flatten(1, 2)
        for i in range(self.depth):
            x = self.get_submodule(f"block{i}")(x)
        tokens: Tensor = self.norm(x.unflatten(1, (rows, count + 2))[:, :, 1:-1].flatten(1, 2))
        return tokens


class _ViTBlock(nn.Module):
    """Pre-norm attention and MLP, under the names that published weights use."""

    def __init__(self, width: int, heads: int, dim_head: int, mlp_dim: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        attention, mlp = nn.Module(), nn.Module()
        attention.to_qkv = nn.Linear(width, 3 * heads * dim_head, bias=qkv_bias)
        attention.to_out = nn.Sequential(nn.Linear(heads * dim_head, width))
        mlp.net = nn.Sequential(nn.Linear(width, mlp_dim), nn.GELU(), nn.Identity(), nn.Linear(mlp_dim, width))
        self.attn = nn.ModuleDict({"norm": nn.LayerNorm(width), "fn": attention})
        self.ff = nn.ModuleDict({"norm": nn.LayerNorm(width), "fn": mlp})

    def forward(self, x: Tensor) -> Tensor:
        attention: Any = self.attn["fn"]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in attention.to_qkv(self.attn["norm"](x)).chunk(3, -1)
        )
        x = x + attention.to_out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mlp: Any = self.ff["fn"]
        out: Tensor = x + mlp.net(self.ff["norm"](x))
        return out


ARCHITECTURES: dict[str, type[Net1D] | type[STMEM]] = {"net1d": Net1D, "st_mem": STMEM}
_LEFT_OUT = ("dense.", "head.", "first_bn.", ".bn1.", ".bn2.", ".bn3.")  # heads, and norms that ECGFounder holds but does not use


def load_ecg_encoder(folder: str | Path) -> PublishedECGEncoder:
    """The encoder at `folder`, frozen, float32. Raises `ECGEncoderError` where its files are missing or not each other's."""
    try:
        model, found = PublishedECGEncoder.from_pretrained(
            component(folder, "ecg_encoder"), use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            low_cpu_mem_usage=False,
        )  # fmt: skip
    except ECGEncoderError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ECGEncoderError(f"{folder} is not a folder of an ECG encoder (see `import_checkpoint`): {error}") from None
    if wrong := [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found.get(kind, ())]:
        architecture = model.config.architecture
        raise ECGEncoderError(f"{folder}: the weights are not those of its {architecture}: {', '.join(wrong[:5])} differ")
    return model.requires_grad_(False).eval()


def import_checkpoint(
    path: str | Path, architecture: str, folder: str | Path, *, shape: dict[str, Any] | None = None, prefix: str = ""
) -> Path:
    """Write the published checkpoint `path` (.pth, read with `weights_only`) as an encoder folder, without its heads.

    `prefix` is cut off the names ("encoder." in ST-MEM's pre-training checkpoints); what does not start with it is left out. Raises
    `ECGEncoderError` where the weights are not those of this architecture and shape.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        content = content.get(name, content)
    named = {key.removeprefix("module."): value for key, value in content.items()}
    kept = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    kept = {key: value for key, value in kept.items() if not any(part in key for part in _LEFT_OUT)}
    model = PublishedECGEncoder(architecture, shape)
    try:
        model.network.load_state_dict(kept)
    except RuntimeError as error:
        raise ECGEncoderError(f"{path} does not hold the weights of this {architecture}: {error}") from None
    model.save_pretrained(folder, safe_serialization=True)
    return Path(folder)
