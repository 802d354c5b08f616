"""The order of the data is a pure function of (seed, epoch): complete, split by rank, and the same from any position on."""

from __future__ import annotations

from itertools import islice

import pytest

from medgen.data.order import SampleOrder


@pytest.mark.parametrize(("n", "batch_size", "world"), [(22, 4, 1), (22, 4, 2), (5, 3, 2), (1, 2, 1)])
def test_every_epoch_holds_every_sample_once_over_all_ranks(n: int, batch_size: int, world: int) -> None:
    ranks = [iter(SampleOrder(n, 0, batch_size, rank=rank, world=world)) for rank in range(world)]
    stream = [item for _ in range(4 * n) for rank in ranks for item in next(rank)]
    for epoch in range(3):
        assert sorted(index for e, index in stream if e == epoch) == list(range(n))
    assert [e for e, _ in stream] == sorted(e for e, _ in stream)


def test_epochs_and_seeds_differ() -> None:
    orders = [[SampleOrder(50, seed, 1).item(epoch * 50 + i)[1] for i in range(50)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("start", [0, 8, 64, 1608])
def test_a_stream_can_begin_anywhere(start: int) -> None:
    whole = list(islice(SampleOrder(22, 3, 4, rank=1, world=2), start // 8 + 5))
    assert list(islice(SampleOrder(22, 3, 4, start=start, rank=1, world=2), 5)) == whole[-5:]


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        SampleOrder(0, 0, 4)
