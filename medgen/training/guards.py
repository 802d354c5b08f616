"""What protects a run from its data: naming the samples behind a NaN, and ending a run that only produces them."""

from __future__ import annotations

from typing import Any

import torch

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved (EX_TEMPFAIL: the same command again continues it)."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a NaN or infinite loss or gradient."""


def suspects(view: Any, batches: list[list[Any]], finite: list[bool]) -> tuple[set[str], set[str], set[str]]:
    """Ids of the samples with a NaN or infinite input, of those in a batch whose loss was not `finite`, and of all.

    `view[key]` gives a sample; `batches` are the keys of each micro batch of the step.
    """
    items = [[view[key] for key in keys] for keys in batches]
    ids = [{str(item["id"]) for item in batch} for batch in items]
    inputs = {str(item["id"]) for batch in items for item in batch if any(map(_nonfinite, item.values()))}
    return inputs, set().union(*(some for some, sound in zip(ids, finite) if not sound)), set().union(*ids)


def _nonfinite(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_nonfinite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_nonfinite, value))
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value) if isinstance(value, float) else None
    return tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all())
