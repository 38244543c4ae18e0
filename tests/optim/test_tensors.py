"""Which parameters a method on matrices takes, and how they are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsso.optim._tensors import choose, cut, merged


@pytest.mark.parametrize(
    ("shape", "limit", "wanted"),
    [
        ((6, 4), 100, (6, 4)),  # a matrix stays one
        ((1, 6, 1, 4), 100, (6, 4)),
        ((16, 3, 3, 3), 30, (16, 27)),
        ((16, 3, 3, 3), 10, (16, 3, 9)),
        ((4, 3, 2, 2, 2), 12, (12, 8)),
        ((64, 3, 5, 5, 5), 8, (64, 3, 5, 5, 5)),
    ],
)
def test_neighbours_are_merged(shape: tuple[int, ...], limit: int, wanted: tuple[int, ...]) -> None:
    assert merged(shape, limit) == wanted


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(2, 9), min_size=2, max_size=4), limit=st.integers(2, 12))
def test_blocks_cover_everything_once(shape: list[int], limit: int) -> None:
    numel = int(torch.tensor(shape).prod())
    seen = torch.zeros(numel)
    keys = set()
    for block in cut("w", shape, limit):
        block.of(seen).add_(1)
        assert max(block.sides) <= max(limit, 2)
        keys.add(block.key)
    assert torch.equal(seen, torch.ones(numel))
    assert keys == {f"w/{i}" for i in range(len(keys))}


def test_blocks_are_as_few_and_as_even_as_they_can_be() -> None:
    sides = [block.sides for block in cut("w", (10, 7), 4)]
    assert sorted({s[0] for s in sides}) == [3, 4]
    assert sorted({s[1] for s in sides}) == [3, 4]
    assert len(sides) == 6


class Odd(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(300_000, 4), nn.Linear(4, 300_000, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Sequential(nn.Conv3d(2, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4))
        self.row = nn.Parameter(torch.zeros(1, 9))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_what_is_taken_and_why_the_rest_is_not() -> None:
    with torch.device("meta"):
        model = Odd()
    found = choose(model, (), embeddings=False)
    assert set(found.shapes) == {"body.0.weight", "body.2.weight"}
    assert found.shapes["body.0.weight"] == (4, 2, 3, 3, 3)
    assert found.rest["embed.weight"] == "embedding"
    assert found.rest["row"] == found.rest["body.1.weight"] == found.rest["body.2.bias"] == "vector"
    assert "frozen" not in found.rest
    assert set(choose(model, ("body.2",), embeddings=False).shapes) == {"body.0.weight"}
    assert choose(model, ("body.2",), embeddings=False).rest["body.2.weight"] == "excluded by the recipe"
    assert "embed.weight" in choose(model, (), embeddings=True).shapes


def test_a_head_that_is_not_tied_is_left_as_well() -> None:
    model = Odd()
    model.head = nn.Linear(4, 5)
    found = choose(model, (), embeddings=False)
    assert found.rest["head.weight"] == "output head over the vocabulary"
