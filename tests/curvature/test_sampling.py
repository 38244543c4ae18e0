"""Which tokens are measured: the same however the batch is cut and padded, each with the same chance."""

from __future__ import annotations

import pytest
import torch

from dsso.curvature import sampling


def _chosen(ids: torch.Tensor, mask: torch.Tensor | None, step: int, stride: int) -> list[list[int]]:
    """Chosen token ids of every example."""
    index, valid = sampling.choose(sampling.phases(ids, mask, step, stride), mask, ids.shape[1], stride)
    return [row[keep].tolist() for row, keep in zip(ids.gather(1, index), valid, strict=True)]


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_the_choice_does_not_depend_on_padding_or_split(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 4, 9, 13, 13]
    rows = [torch.randint(5, 1000, (n,), generator=generator) for n in lengths]
    for step in range(6):
        alone = [_chosen(row.view(1, -1), None, step, stride)[0] for row in rows]
        for width, left in ((13, False), (13, True), (20, False), (20, True)):
            ids, mask = torch.zeros(5, width, dtype=torch.long), torch.zeros(5, width, dtype=torch.long)
            for i, row in enumerate(rows):
                place = slice(width - len(row), width) if left else slice(0, len(row))
                ids[i, place], mask[i, place] = row, 1
            assert _chosen(ids, mask, step, stride) == alone
            assert _chosen(ids[2:4], mask[2:4], step, stride) == alone[2:4]


def test_every_token_has_the_same_chance() -> None:
    ids = torch.arange(24).view(1, -1) + 100
    stride, steps = 4, 4000
    seen = torch.zeros(24)
    for step in range(steps):
        index, valid = sampling.choose(sampling.phases(ids, None, step, stride), None, 24, stride)
        assert valid.all()
        seen[index] += 1
    expected = steps / stride
    assert (seen - expected).abs().max() < 5 * (expected * (1 - 1 / stride)) ** 0.5


def test_examples_of_a_batch_differ() -> None:
    """A first token that carries all of the gradient is in a share of the examples of every step."""
    ids = torch.randint(5, 30000, (512, 16), generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(sampling.phases(ids, None, 0, 4), minlength=4)
    assert counts.min() > 90


def test_stride_one_is_everything() -> None:
    ids = torch.arange(10).view(2, 5)
    assert _chosen(ids, None, 3, 1) == ids.tolist()
