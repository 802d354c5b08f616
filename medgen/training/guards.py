"""What protects a run from its data: naming the samples behind a NaN, and ending a run that only produces them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved (EX_TEMPFAIL: the same command again continues it)."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a NaN or infinite loss or gradient."""


def suspects(items: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the items that hold a NaN or infinite number."""
    return {str(item["id"]) for item in items if any(map(_nonfinite, item.values()))}


def _nonfinite(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_nonfinite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_nonfinite, value))
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value) if isinstance(value, float) else None
    return tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all())
