"""From a moving ventricle to B-mode frames: tissue that carries its own speckle, seen by a phased array in an apical window.

Speckle is a fixed random field of scatterers in the tissue's own coordinates; every frame looks the tissue up where it has moved to,
blurs it with the point spread function of the probe in beam coordinates and takes the envelope (Meunier & Bertrand 1995), so that
speckle moves, stretches and decorrelates as it does in ultrasound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medgen.digital.heart import Heart, Motion
from medgen.seeds import stable_seed

ApicalView = Literal["A4C", "A2C"]
CAVITY, MYOCARDIUM, ATRIUM = 1, 2, 3
_DEPTHS, _BEAMS = 168, 88
_CHUNK = 8  # frames at once: their arrays stay in the processor's cache
_TEXTURE_MM = 0.6  # spacing of scatterers
_FIELD_MM = 260.0


@dataclass(frozen=True)
class Window:
    """How the probe looks at the heart, and how the machine is set. mm, degrees, dB."""

    view: ApicalView
    depth: float
    sector: float  # full opening angle
    apex: tuple[float, float]  # right, down from the probe
    tilt: float  # of the long axis, the ring to the right
    gain: float
    dynamic_range: float
    noise: float  # level of the electronic noise at the far end
    haze: float
    shadow: tuple[float, float, float] | None  # centre and half width in degrees, attenuation
    seed: int


def draw_window(heart: Heart, view: ApicalView, seed: int) -> Window:
    """The acquisition of one clip of `heart`."""
    rng = np.random.default_rng(stable_seed("echo window", heart.seed, view, seed))
    top = float(rng.uniform(20, 32))
    shadow = None
    if rng.random() < 0.35:
        shadow = (float(rng.choice([-1, 1]) * rng.uniform(22, 38)), float(rng.uniform(3, 7)), float(rng.uniform(8, 22)))
    return Window(
        view=view,
        depth=float(min(max(top + heart.length_mm + heart.atrium_mm + rng.uniform(8, 20), 140), 190)),
        sector=float(rng.uniform(76, 90)),
        apex=(float(rng.normal(9 if view == "A4C" else 1, 3)), top),
        tilt=float(rng.normal(4 if view == "A4C" else 0, 4)),
        gain=float(rng.uniform(-4, 4)),
        dynamic_range=float(rng.uniform(50, 60)),
        noise=float(rng.uniform(-58, -48)),
        haze=float(rng.uniform(0.0, 1.0)),
        shadow=shadow,
        seed=stable_seed("echo window", heart.seed, view, seed, "texture"),
    )


@dataclass(frozen=True)
class Clip:
    """frames [T,H,W] float32 in [0,1]; masks [T,H,W] uint8 (1 LV cavity, 2 myocardium, 3 left atrium, 0 elsewhere); mm per pixel."""

    frames: np.ndarray
    masks: np.ndarray
    pixel_mm: float


def film(heart: Heart, window: Window, motion: Motion, breath: np.ndarray, size: int = 112) -> Clip:
    """The clip that `window` records of `motion` with the chest at `breath` [T], -1 (out) to 1 (in)."""
    depth = (torch.arange(_DEPTHS) + 0.5) / _DEPTHS * window.depth
    angle = (torch.arange(_BEAMS) - (_BEAMS - 1) / 2) / (_BEAMS - 1) * np.deg2rad(window.sector)
    beams = depth[:, None] * angle.sin()[None], depth[:, None] * angle.cos()[None]
    pixel = window.depth / size
    px = ((torch.arange(size) - (size - 1) / 2) * pixel)[None].expand(size, size)
    pz = ((torch.arange(size) + 0.5) * pixel)[:, None].expand(size, size)
    radius, bearing = torch.sqrt(px**2 + pz**2), torch.atan2(px, pz)
    grid = torch.stack([bearing / angle[-1], radius / window.depth * 2 - 1], -1)[None]
    inside = (radius < window.depth) & (bearing.abs() <= angle[-1]) & (radius > 1.5)
    machine, frames, masks = _Machine(window, depth, angle), [], []
    for start in range(0, len(breath), _CHUNK):
        part = slice(start, start + _CHUNK)
        anatomy = Anatomy(heart, window, motion[part], breath[part])
        display = machine.display(_scattered(anatomy, *beams))
        seen = F.grid_sample(display[:, None], grid.expand(len(display), -1, -1, -1), align_corners=False)[:, 0]
        frames.append((seen * inside).clamp(0, 1).numpy())
        masks.append((anatomy.locate(px, pz).region * inside).numpy())
    return Clip(np.concatenate(frames), np.concatenate(masks), float(pixel))


@dataclass(frozen=True)
class _Place:
    """Where points are in the tissue: along and across in the reference (end-diastolic) heart, mm [T,...], and what they belong to."""

    along: Tensor
    across: Tensor
    region: Tensor
    cavity: Tensor  # signed distance inside the LV cavity, mm, roughly
    wall: Tensor


class Anatomy:
    """The heart in its window; every method takes points [H,W] in mm (right, down) and answers for all T frames."""

    def __init__(self, heart: Heart, window: Window, motion: Motion, breath: np.ndarray) -> None:
        self.heart, self.window, self.motion = heart, window, motion
        squeeze = 1 - motion.length / heart.length_mm
        tilt = np.deg2rad(window.tilt + 1.2 * breath + 12 * squeeze * (1 if window.view == "A4C" else 0.4))
        self.origin = (_frames(window.apex[0] + 1.5 * breath), _frames(window.apex[1] + 1.2 * breath))
        self.sine, self.cosine = _frames(np.sin(tilt)), _frames(np.cos(tilt))
        self.length, self.length0 = _frames(motion.length), heart.length_mm
        self.septal, self.lateral, self.wall = (_frames(v) for v in (motion.septal, motion.lateral, motion.wall))
        self.width0, self.wall0 = heart.half_width_mm, heart.wall_mm
        self.cap = 0.8 * heart.wall_mm  # muscle over the apex
        self.roof = heart.length_mm + heart.atrium_mm + 20
        self.emptying = _frames((1 - motion.volume_ml / heart.edv_ml).clip(0, 1))
        self.texture = _texture(window.seed)
        clouds = torch.Generator().manual_seed(stable_seed(window.seed, "tissue") % 2**62)
        self.clouds = F.interpolate(torch.randn(1, 1, 14, 14, generator=clouds), size=(120, 120), mode="bicubic")

    def along_across(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Along the long axis from the apex and across it (septum negative), mm [T,H,W]."""
        dx, dz = x[None] - self.origin[0], z[None] - self.origin[1]
        return dx * self.sine + dz * self.cosine, dx * self.cosine - dz * self.sine

    def locate(self, x: Tensor, z: Tensor) -> _Place:
        """Undo the motion: where each point's tissue lies at end-diastole."""
        a, b = self.along_across(x, z)
        width = torch.where(b < 0, self.septal, self.lateral)
        side = b.abs()
        inner = width * _profile(a / self.length)
        outer = (width + self.wall) * _profile((a + self.cap) / (self.length + self.cap)) * 1.02
        inside_axis = (a > 0) & (a < self.length)
        inner = torch.where(inside_axis, inner, torch.zeros_like(inner))
        # along: apex fixed, ring moving, atrial roof fixed
        beyond = (a - self.length) / (self.roof - self.length)
        along = torch.where(a > 0, a * self.length0 / self.length, a)
        stretched = self.length0 + beyond * (self.roof - self.length0)
        along = torch.where(a > self.length, torch.where(beyond < 1, stretched, a), along)
        inner0 = torch.where(inside_axis, self.width0 * _profile(along / self.length0), torch.zeros_like(inner))
        outer0 = (self.width0 + self.wall0) * _profile((along + self.cap) / (self.length0 + self.cap)) * 1.02
        cavity0 = side / inner.clamp(min=1e-3) * inner0
        wall0 = inner0 + (side - inner) / (outer - inner).clamp(min=1e-3) * (outer0 - inner0)
        outside = side - outer
        right = self._right_ventricle(outside, along, b)
        across = torch.where(side < inner, cavity0, torch.where(side < outer, wall0, outer0 + right))
        # behind the ring the walls go over into the atrium's, which hardly move
        fade = torch.exp(-(a - self.length).clamp(min=0) / 12)
        ratio = (self.width0 + self.wall0) / (width + self.wall)
        across = torch.where(a > self.length, side * (1 + (ratio - 1) * fade), across)
        region = torch.zeros_like(a, dtype=torch.uint8)
        muscle = (side < outer) & (a > -self.cap) & (a < self.length)
        region[muscle] = MYOCARDIUM
        region[(side < inner) & inside_axis] = CAVITY
        signed = across * torch.where(b < 0, -1.0, 1.0)
        region[self._atrium(along, signed) > 0] = ATRIUM
        return _Place(along, signed, region, inner - side, outer - side)

    def _right_ventricle(self, outside: Tensor, along: Tensor, b: Tensor) -> Tensor:
        """Distance from the epicardium at rest; on the septal side the right ventricle narrows in systole."""
        if self.window.view == "A2C":
            return outside
        room = self.right_width(along) * (1 - 0.55 * self.emptying)
        rest = self.right_width(along)
        within = outside * rest / room.clamp(min=1e-3)
        past = outside + (rest - room) * torch.exp(-(outside - room).clamp(min=0) / 18)
        return torch.where((b < 0) & (outside > 0), torch.where(outside < room, within, past), outside)

    def right_width(self, along: Tensor) -> Tensor:
        """Width of the right ventricle's cavity at rest: a triangle with its base at the ring."""
        s = ((along / self.length0) - 0.12) / 0.88
        return self.heart.right_mm * s.clamp(0, 1).sqrt() + 1e-3

    def _atrium(self, along: Tensor, across: Tensor) -> Tensor:
        """Signed distance inside the left atrium at rest, mm."""
        half, width = self.heart.atrium_mm / 2, 0.92 * self.width0 + 3
        centre = self.length0 + 1.5 + half
        shift = 2.0 if self.window.view == "A4C" else 0.0
        radius = torch.sqrt(((along - centre) / half) ** 2 + ((across - shift) / width) ** 2)
        inside = (1 - radius) * min(half, width)
        return torch.where(along > self.length0, inside, torch.full_like(inside, -9.0))

    def echogenicity(self, place: _Place) -> Tensor:
        """Backscatter in dB [T,H,W] of tissue at rest coordinates; blood is nearly black."""
        a, b, side = place.along, place.across, place.across.abs()
        four = self.window.view == "A4C"
        level = -31.0 + 6.0 * self._patches(a, b)
        outer0 = (self.width0 + self.wall0) * _profile((a + self.cap) / (self.length0 + self.cap)) * 1.02
        ventricular = (a > -self.cap) & (a < self.length0)
        level = _blend(level, -15.5, torch.where(ventricular, place.wall, torch.full_like(a, -9.0)), 0.8)
        # pericardium: a bright line outside the free wall
        line = torch.exp(-(((side - outer0 - 1.5) / 1.6) ** 2)) * (ventricular & ((b > 0) | (not four)))
        level = level + 17 * line
        if four:
            free = torch.where((b < 0) & ventricular, side - outer0, torch.full_like(a, -9.0))
            room = self.right_width(a)
            level = _blend(level, -16.0, torch.minimum(free, room + 4.5 - free), 0.8)
            level = _blend(level, -47.0, torch.minimum(free, room - free), 0.8)
            level = _blend(level, -46.0, self._right_atrium(a, b), 0.9)
        atrium = self._atrium(a, b)
        level = _blend(level, -15.0, atrium + 3.5, 0.8)
        level = _blend(level, -47.0, atrium, 0.8)
        level = _blend(level, -49.0, torch.where(ventricular, place.cavity, torch.full_like(a, -9.0)), 0.7)
        for sign in (-1, 1):  # the ring: fibrous, bright
            spot = ((a - self.length0) / 3.0) ** 2 + ((b - sign * (self.width0 * 0.9 + 2)) / 3.4) ** 2
            level = torch.maximum(level, -7 - 9 * spot)
        return level

    def _patches(self, along: Tensor, across: Tensor) -> Tensor:
        """Slow variation of the tissue around the heart, about -1.5 to 1.5, fixed to the patient."""
        where = torch.stack([across, along - 90], -1) * (2 / _FIELD_MM)
        return F.grid_sample(self.clouds.expand(len(where), -1, -1, -1), where, padding_mode="reflection", align_corners=False)[
            :, 0
        ]

    def _right_atrium(self, along: Tensor, across: Tensor) -> Tensor:
        """Signed distance inside the right atrium at rest, mm."""
        half, width = 0.46 * self.heart.atrium_mm, 0.75 * self.heart.right_mm
        centre_b = -(self.width0 + self.wall0 + width + 1.0)
        radius = torch.sqrt(((along - self.length0 - 2 - half) / half) ** 2 + ((across - centre_b) / width) ** 2)
        return torch.where(along > self.length0 - 2, (1 - radius) * min(half, width), torch.full_like(along, -9.0))

    def leaflets(self, x: Tensor, z: Tensor) -> Tensor:
        """Brightness of the atrioventricular leaflets [T,H,W] in dB above nothing (-inf is far away): thin, moving, on the ring."""
        a, b = self.along_across(x, z)
        opening = _frames(self.motion.opening)
        nearest = self._valve(a, b, -0.88 * self.septal, 0.88 * self.lateral, opening, 0.62)
        if self.window.view == "A4C":
            inner = -(self.septal + self.wall) - 1
            room = self.heart.right_mm * (1 - 0.4 * self.emptying)
            nearest = torch.minimum(nearest, self._valve(a + 1, b, inner - room, inner, opening, 0.5))
        return -10.0 - 4.3 * (nearest / 0.8) ** 2

    def _valve(self, a: Tensor, b: Tensor, left: Tensor, right: Tensor, opening: Tensor, reach: float) -> Tensor:
        """Distance to two leaflets hinged at `left` and `right` of the ring; shut they meet below it, open they point to the apex."""
        span = (right - left) / 2
        nearest = torch.full_like(a, 1e3)
        for hinge, sign in ((left, 1.0), (right, -1.0)):
            swing = opening * 1.25  # radians from shut (towards the middle) to open (towards the apex)
            reach_mm = span * (1.02 + reach * opening)
            tip_b = hinge + sign * reach_mm * torch.cos(swing) * (1 - 0.12 * opening)
            tip_a = self.length - 3.0 - reach_mm * torch.sin(swing)
            bend_b = hinge + sign * 0.5 * reach_mm * torch.cos(0.55 * swing)
            bend_a = self.length - 4.5 - 0.5 * reach_mm * torch.sin(0.8 * swing)
            for start, end in (((self.length, hinge), (bend_a, bend_b)), ((bend_a, bend_b), (tip_a, tip_b))):
                nearest = torch.minimum(nearest, _to_segment(a, b, start, end))
        return nearest


def _scattered(anatomy: Anatomy, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Scatterers [T,2,D,B] (complex) and the amplitude [T,D,B] of what they are in, at points [D,B] in mm."""
    place = anatomy.locate(x, z)
    level = torch.maximum(anatomy.echogenicity(place), anatomy.leaflets(x, z))
    grid = torch.stack([place.across, place.along - 90], -1) * (2 / _FIELD_MM)
    texture = anatomy.texture.expand(len(grid), -1, -1, -1)
    return F.grid_sample(texture, grid, padding_mode="reflection", align_corners=False), torch.exp(level * (np.log(10) / 20))


class _Machine:
    """Probe and machine of one clip: blur, electronic noise, gains, near-field clutter, haze, shadow, logarithmic compression."""

    def __init__(self, window: Window, depth: Tensor, angle: Tensor) -> None:
        self.window = window
        self.axial, self.lateral = 1.1 * _DEPTHS / window.depth, 1.15 * _BEAMS / window.sector
        self.noise_generator = torch.Generator().manual_seed(window.seed % 2**62)
        self.noise = 10 ** ((window.noise + 16 * (torch.linspace(0, 1, _DEPTHS)[:, None] - 1)) / 20)
        self.focus: Tensor | None = None
        rng = np.random.default_rng(stable_seed(window.seed, "machine"))
        generator = torch.Generator().manual_seed(stable_seed(window.seed, "clutter") % 2**62)
        shape = (len(depth), len(angle))
        coarse = torch.randn(1, 1, 6, 9, generator=generator)
        gain = 2.0 * F.interpolate(coarse, size=shape, mode="bicubic", align_corners=True)[0, 0]
        beams = F.interpolate(torch.randn(1, 1, 11, generator=generator), size=shape[1], mode="linear", align_corners=True)[0, 0]
        edge = (angle / angle[-1]).abs()
        self.gain = gain + window.gain + 1.8 * beams - 7 * (edge.clamp(min=0.72) - 0.72) / 0.28
        if window.shadow is not None:
            centre, half, loss = window.shadow
            beam = torch.exp(-(((angle.rad2deg() - centre) / half) ** 2))
            self.gain = self.gain - loss * beam[None] * ((depth[:, None] - 18) / 30).clamp(0, 1)
        clutter = 0.22 * torch.exp(-depth / 9)[:, None] * (1 + 0.5 * torch.rand(len(depth), 1, generator=generator))
        haze = window.haze * 0.006 * torch.exp(-(((depth - rng.uniform(40, 70)) / 28) ** 2))[:, None]
        clouds = F.interpolate(torch.rand(1, 1, 5, 7, generator=generator), size=shape, mode="bicubic")[0, 0].clamp(min=0)
        self.still = clutter + haze * clouds * (1 + 0.5 * torch.rand(shape, generator=generator))

    def display(self, scattered: tuple[Tensor, Tensor]) -> Tensor:
        """Brightness [T,D,B] in [0,1] of `_scattered`'s field and amplitude."""
        field, amplitude = scattered
        if self.focus is None:
            # Near the probe neighbouring beams see the same scatterers, which add up: the machine's depth gain takes that back.
            power = _blur(field[:1], self.axial, self.lateral).square().sum(1).mean(-1)  # [1,D]
            smooth = F.avg_pool1d(F.pad(power, (12, 12), mode="replicate"), 25, 1)[0]
            self.focus = (2 / smooth).sqrt()[:, None]
        signal = field * (amplitude * self.focus)[:, None]
        signal = signal + torch.randn(signal.shape, generator=self.noise_generator) * self.noise
        envelope = _blur(signal, self.axial, self.lateral).square().sum(1).sqrt()
        decibels = 20 * torch.log10((envelope + self.still).clamp(min=1e-6)) + self.gain
        scale = self.window.dynamic_range
        return ((decibels + scale - 4) / scale).clamp(0, 1) ** 1.15


def _texture(seed: int) -> Tensor:
    """Complex scatterers of the tissue [1,2,N,N], unit power, with slow variation of their strength."""
    count = int(_FIELD_MM / _TEXTURE_MM)
    generator = torch.Generator().manual_seed(stable_seed(seed, "scatterers") % 2**62)
    field = torch.randn(1, 2, count, count, generator=generator)
    patches = F.interpolate(torch.randn(1, 1, 40, 40, generator=generator), size=(count, count), mode="bicubic")
    return field * 10 ** (3.0 * patches / 20)


def _blur(signal: Tensor, axial: float, lateral: float) -> Tensor:
    """Separable Gaussian point spread function on [..., D, B]; standard deviations in samples. Power of white noise is kept."""
    return _band(signal.shape[-2], axial) @ signal @ _band(signal.shape[-1], lateral)


@lru_cache(maxsize=16)
def _band(count: int, sigma: float) -> Tensor:
    """A Gaussian filter of unit power as a symmetric matrix: ten times faster than a convolution of one channel."""
    position = torch.arange(count)
    taps = torch.exp(-0.5 * ((position[:, None] - position) / sigma) ** 2)
    taps = torch.where(taps < 1e-4, 0.0, taps)  # the smallest would be denormal numbers, which are slow
    return taps / (np.pi**0.5 * sigma) ** 0.5


def _to_segment(a: Tensor, b: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
    """Distance from points to a segment, both given per frame."""
    da, db = end[0] - start[0], end[1] - start[1]
    along = (((a - start[0]) * da + (b - start[1]) * db) / (da**2 + db**2).clamp(min=1e-6)).clamp(0, 1)
    return torch.sqrt((a - start[0] - along * da) ** 2 + (b - start[1] - along * db) ** 2)


def _blend(level: Tensor, new: float, inside_mm: Tensor, softness: float) -> Tensor:
    """`new` where the signed distance is positive, with a soft edge."""
    weight = torch.sigmoid(inside_mm / softness)
    return level + (new - level) * weight


def _profile(s: Tensor) -> Tensor:
    """`heart.profile` for tensors."""
    s = s.clamp(0, 1)
    rest = 1 - s
    return torch.sqrt(1 - rest * rest * rest.sqrt()) * (1 - 0.12 * s * s)


def _frames(values: np.ndarray) -> Tensor:
    """[T] → [T,1,1] float32."""
    return torch.as_tensor(np.asarray(values, dtype=np.float32))[:, None, None]
