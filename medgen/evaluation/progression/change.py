"""How well a forecast says what changed since the last image: the difference to it, wanted and predicted, pixel by pixel.

An image can be near to the truth because nothing happened. What happened is in d = x_b − x_a alone, and copying x_a predicts none of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from medgen.evaluation.progression.fidelity import ssim
from medgen.evaluation.statistics import Floats

THRESHOLD = 0.02  # of the image's range: a pixel changed by more than this changed
FEWEST = 10  # pixels on either side, below which ranks are an accident


def change_fidelity(last: ArrayLike, predicted: ArrayLike, true: ArrayLike, threshold: float = THRESHOLD) -> dict[str, Floats]:
    """relative_error, delta_ssim, rank_error and auroc, each [N], of images [N,*S] in [0,1].

    With d = true − last and d̂ = predicted − last:

    - relative_error: |d̂ − d| / |d|; copying the last image scores 1.
    - delta_ssim: structural similarity of d̂ and d.
    - rank_error: (1 − Spearman(d̂, d)) / 2 over the pixels with |d| > `threshold`; copying scores ½.
    - auroc: how well d̂ tells, among those pixels, the ones that became brighter from those that became darker; ties and copying ½.

    NaN where fewer than ten pixels changed (auroc: brighter, or darker).
    """
    before, made, wanted = (np.asarray(values, dtype=np.float64) for values in (last, predicted, true))
    if not before.shape == made.shape == wanted.shape:
        raise ValueError(f"three times [N,*S] is needed, got {list(before.shape)}, {list(made.shape)}, {list(wanted.shape)}")
    d, seen = (wanted - before).reshape(len(before), -1), (made - before).reshape(len(before), -1)
    ranks = [_ranks(one, other, threshold) for one, other in zip(seen, d, strict=True)]
    return {
        "relative_error": np.linalg.norm(seen - d, axis=1) / np.maximum(np.linalg.norm(d, axis=1), 1e-9),
        "delta_ssim": ssim(made - before, wanted - before),
        "rank_error": np.array([rank for rank, _ in ranks]),
        "auroc": np.array([auroc for _, auroc in ranks]),
    }


def _ranks(seen: Floats, wanted: Floats, threshold: float) -> tuple[float, float]:
    """rank_error and auroc of one image's differences [P]."""
    changed = np.abs(wanted) > threshold
    seen, wanted = seen[changed], wanted[changed]
    if len(wanted) < FEWEST:
        return float("nan"), float("nan")
    constant = np.ptp(seen) < 1e-12 or np.ptp(wanted) < 1e-12
    rank = 0.5 if constant else float((1 - spearmanr(seen, wanted).statistic) / 2)
    brighter = wanted > 0
    if min(brighter.sum(), (~brighter).sum()) < FEWEST:
        return rank, float("nan")
    return rank, float(roc_auc_score(brighter, seen))
