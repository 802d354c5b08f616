"""The heart of a digital patient as a current dipole: P, QRS and T waves as Gaussians in three dimensions, and its lead field.

Frank's axes in mV: x to the patient's left, y to the feet, z to the back. Two further components are near-field potentials
that only the chest electrodes see, so that, as in patients, no three leads determine the others exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from medgen.digital.rhythm import Beat
from medgen.seeds import stable_seed

Conduction = Literal["normal", "rbbb", "lbbb"]
CONDUCTIONS: tuple[Conduction, ...] = get_args(Conduction)
COMPONENTS = 5  # x, y, z, and two near-field

# Dower et al., "On deriving the electrocardiogram from vectorcardiographic leads", Clin Cardiol 1980: leads from Frank's x, y, z.
_DOWER = {
    "I": (0.632, -0.235, 0.059),
    "II": (0.235, 1.066, -0.132),
    "V1": (-0.515, 0.157, -0.917),
    "V2": (0.044, 0.164, -1.387),
    "V3": (0.882, 0.098, -1.277),
    "V4": (1.213, 0.127, -0.601),
    "V5": (1.125, 0.127, -0.086),
    "V6": (0.831, 0.076, 0.230),
}


class Wave(NamedTuple):
    """A Gaussian in time: centre, widths before and after it (standard deviations) in seconds, and its vector [5] in mV."""

    centre: float
    before: float
    after: float
    vector: NDArray[np.float64]


@dataclass(frozen=True)
class Heart:
    """What is one patient's own. Waves of P and QRS are placed relative to `Beat.p` and `Beat.r`, T waves relative to `Beat.t_end`."""

    p: tuple[Wave, ...]
    qrs: tuple[Wave, ...]
    t: NDArray[np.float64]
    early_qrs: tuple[Wave, ...]
    early_t: NDArray[np.float64]
    paced_qrs: tuple[Wave, ...]
    paced_t: NDArray[np.float64]
    spike: NDArray[np.float64]
    fibrillation: NDArray[np.float64]
    u: NDArray[np.float64]
    t_shape: tuple[float, float]
    conduction: Conduction


def _v(x: float, y: float, z: float, near: float = 0.0, far: float = 0.0) -> NDArray[np.float64]:
    return np.array([x, y, z, near, far])


def _qrs(conduction: Conduction) -> list[Wave]:
    """Septum, apex, left ventricle, base; a blocked bundle's ventricle comes late and slowly."""
    if conduction == "lbbb":  # no septal q; slurred, leftward and backward
        return [
            Wave(-0.034, 0.013, 0.013, _v(0.30, 0.22, 0.10, 0.05)),
            Wave(-0.006, 0.018, 0.018, _v(0.72, 0.32, 0.85, -0.05, 0.04)),
            Wave(0.032, 0.017, 0.017, _v(0.62, 0.02, 0.62, 0.0, -0.05)),
        ]
    normal = [
        Wave(-0.022, 0.007, 0.007, _v(-0.14, -0.03, -0.26, 0.06, -0.02)),
        Wave(-0.009, 0.008, 0.008, _v(0.50, 0.34, -0.45, -0.05, 0.06)),
        Wave(0.003, 0.009, 0.009, _v(0.95, 0.72, 0.42, 0.03, -0.05)),
        Wave(0.022, 0.009, 0.010, _v(-0.08, -0.10, 0.48, -0.03, 0.03)),
    ]
    return normal if conduction == "normal" else [*normal[:3], Wave(0.050, 0.014, 0.018, _v(-0.52, 0.05, -0.50, 0.06, 0.02))]


def _wide(axis: NDArray[np.float64], rng: np.random.Generator) -> list[Wave]:
    """A QRS that spreads through muscle, not bundles: slow, its vector turning about `axis`."""
    side = np.cross(axis, rng.standard_normal(3))
    side *= 0.5 * np.linalg.norm(axis) / np.linalg.norm(side)
    near = rng.normal(0, 0.06, (3, 2))
    parts = ((-0.038, 0.016, 0.35 * axis + side), (0.0, 0.021, axis), (0.040, 0.020, 0.4 * axis - side))
    return [Wave(t, width, width, np.concatenate([v, n])) for (t, width, v), n in zip(parts, near, strict=True)]


def draw_heart(seed: int, conduction: Conduction | None = None) -> Heart:
    """The heart of patient `seed`: size of every wave, electrical axis, conduction (drawn if None: 8 % RBBB, 5 % LBBB)."""
    rng = np.random.default_rng(stable_seed("digital heart's currents", seed))
    block = rng.random()
    if conduction is None:
        conduction = "rbbb" if block < 0.08 else "lbbb" if block < 0.13 else "normal"
    turn = Rotation.from_euler("zyx", rng.normal((0, 0, 0), (22, 14, 10)), degrees=True)  # frontal axis varies most
    size, t_size, p_size = np.exp(rng.normal((0, 0, 0), (0.22, 0.3, 0.2)))
    stretch = float(np.exp(rng.normal(0, 0.08)))

    def own(waves: list[Wave], scale: float, rotation: Rotation = turn) -> tuple[Wave, ...]:
        drawn = [_turned(w.vector * np.exp(rng.normal(0, 0.12)) * scale, rotation) for w in waves]
        return _centred([Wave(w.centre * stretch, w.before * stretch, w.after * stretch, v) for w, v in zip(waves, drawn)])

    p = [Wave(-0.016, 0.017, 0.019, _v(0.025, 0.070, -0.045)), Wave(0.017, 0.019, 0.018, _v(0.070, 0.062, 0.040))]
    qrs = own(_qrs(conduction), size)
    t_axis = _v(0.23, 0.15, -0.17, 0.03, 0.01) if conduction == "normal" else -0.30 * _area(qrs) + _v(0.12, 0.12, -0.02)
    # Ectopic foci: right outflow tract (to the left and down), or the left ventricle (to the right); a pacing lead sits in the apex.
    focus = np.array([0.75, 1.05, 0.75]) if rng.random() < 0.5 else np.array([-0.75, rng.choice([-0.9, 0.9]), -0.8])
    early = own(_wide(focus, rng), 1.15 * size, Rotation.identity())
    paced = own(_wide(np.array([0.65, -0.95, 0.85]), rng), 1.1 * size, turn)
    return Heart(
        p=tuple(Wave(w.centre, w.before, w.after, _turned(w.vector * p_size, turn)) for w in p),
        qrs=qrs,
        t=_turned(t_axis * t_size, Rotation.from_euler("zyx", rng.normal(0, 10, 3), degrees=True) * turn),
        early_qrs=early,
        early_t=-0.36 * _area(early) * t_size**0.5,
        paced_qrs=paced,
        paced_t=-0.30 * _area(paced) * t_size**0.5,
        spike=np.append(_turned(_v(0.5, 0.9, 0.3) * rng.uniform(0.3, 1.5), turn)[:3], (0.0, 0.0)),
        fibrillation=_v(0.012, 0.030, -0.050) * float(np.exp(rng.normal(0, 0.4))),
        u=_v(0.03, 0.02, -0.03) * float(rng.uniform(0, 1)),
        t_shape=(float(rng.uniform(0.10, 0.13)), float(rng.uniform(1.3, 1.8))),
        conduction=conduction,
    )


def _turned(vector: NDArray[np.float64], rotation: Rotation) -> NDArray[np.float64]:
    return np.concatenate([rotation.apply(vector[:3]), vector[3:]])


def _area(waves: tuple[Wave, ...]) -> NDArray[np.float64]:
    """Mean QRS vector, as large as its peak: what a secondary T wave opposes."""
    total = sum(((w.before + w.after) * w.vector for w in waves), np.zeros(COMPONENTS))
    return total / sum(w.before + w.after for w in waves) * len(waves) / 2


def _centred(waves: list[Wave]) -> tuple[Wave, ...]:
    """The same waves shifted so that the dipole is largest at time 0: that is what `Beat.r` means."""
    times = np.arange(-0.12, 0.12, 0.0005)
    size = np.linalg.norm(sum(np.outer(w.vector[:3], shape(w, times)) for w in waves), axis=0)
    shift = float(times[size.argmax()])
    return tuple(w._replace(centre=w.centre - shift) for w in waves)


def shape(wave: Wave, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The wave's course at `times` (seconds from its anchor): 1 at its centre."""
    away = times - wave.centre
    return np.exp(-0.5 * (away / np.where(away < 0, wave.before, wave.after)) ** 2)


def waves(heart: Heart, beat: Beat, t_gain: float = 0.0) -> list[Wave]:
    """All waves of one beat with centres in seconds of the rhythm's clock. `t_gain` (mV) is added to the T wave's size.

    The tangent to the T wave's steepest descent meets the baseline at `Beat.t_end`: a Gaussian's does 2 standard deviations
    after its peak.
    """
    qrs, t = {"pvc": (heart.early_qrs, heart.early_t), "paced": (heart.paced_qrs, heart.paced_t)}.get(
        beat.kind, (heart.qrs, heart.t)
    )
    after, before = heart.t_shape[0] * (beat.t_end - beat.r), heart.t_shape[1] * (1.3 if beat.kind in ("pvc", "paced") else 1.0)
    t = t * (1 + t_gain / max(float(np.linalg.norm(t[:3])), 1e-6))
    placed = [w._replace(centre=beat.r + w.centre) for w in qrs]
    placed.append(Wave(beat.t_end - 2 * after, before * after, after, t))
    if beat.p is not None:
        placed += [w._replace(centre=beat.p + w.centre) for w in heart.p]
    if beat.rr > 0.85 and beat.kind == "sinus":  # U waves show where the heart is slow
        placed.append(Wave(beat.t_end + 0.09, 0.03, 0.035, heart.u))
    return placed


def draw_lead_field(seed: int) -> dict[str, NDArray[np.float64]]:
    """Lead vectors [5] of I, II and V1-V6 for patient `seed`: Dower's, altered by torso and by where the electrodes stick.

    The limb electrodes are far from the heart: they see only the dipole.
    """
    rng = np.random.default_rng(stable_seed("lead field", seed))
    field: dict[str, NDArray[np.float64]] = {}
    low = rng.normal(0, 0.5)  # electrodes an intercostal space too high or low, all together
    near = np.cumsum(rng.normal(0, 0.6, (6, 2)), 0) + rng.normal(0, 0.8, 2)  # neighbours see alike
    names = list(_DOWER)
    rows = np.array(list(_DOWER.values()))
    rows = rows * np.exp(rng.normal(0, 0.08, (8, 1))) + rng.normal(0, 0.05, (8, 3))
    between = np.clip(rng.normal(0, 0.25), -0.6, 0.6)  # chest electrodes shifted along the row
    chest = rows[2:]
    neighbour = np.roll(chest, -1 if between > 0 else 1, axis=0)
    neighbour[-1 if between > 0 else 0] = chest[-1 if between > 0 else 0]
    rows[2:] = (1 - abs(between)) * chest + abs(between) * neighbour
    rows[2:, 1] += 0.15 * low
    for i, name in enumerate(names):
        field[name] = np.concatenate([rows[i], near[i - 2] if i >= 2 else np.zeros(2)])
    return field
