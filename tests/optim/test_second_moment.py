"""Second moments of one side, packed and square."""

from __future__ import annotations

import pytest
import torch

from dsso.optim import _second_moment
from dsso.optim._second_moment import SecondMoments


@pytest.mark.parametrize("narrow", [0, 64], ids=["square", "packed"])
@pytest.mark.parametrize("sides", [(7, 4), (1, 6), (3, 7, 2)])
def test_packed_or_not_it_is_the_same_sum(
    sides: tuple[int, ...], narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_second_moment, "NARROW", narrow)
    torch.manual_seed(0)
    like = torch.zeros((), dtype=torch.float64)
    for dim, side in enumerate(sides):
        moments = SecondMoments(3, side, dim, like)
        wanted = torch.zeros(3, side, side).double()
        for weight in (1.0, 0.25):
            x = torch.randn(3, *sides).double()
            moments.add(x, torch.tensor(0.7).double(), weight)
            flat = x.movedim(dim + 1, 1).reshape(3, side, -1)
            wanted = 0.7 * wanted + weight * flat @ flat.mT
        assert moments.tensor[0].numel() == SecondMoments.elements(side)
        assert (moments.tensor.dim() == 2) == (side <= narrow)
        for index in range(3):
            torch.testing.assert_close(moments.lower(index).tril(), wanted[index].tril())
            torch.testing.assert_close(moments.whole(index), wanted[index])
            torch.testing.assert_close(
                _second_moment.lower(moments.tensor[index], side).tril(), wanted[index].tril()
            )


def test_packed_costs_half() -> None:
    assert SecondMoments.elements(16) == 136
    assert SecondMoments.elements(_second_moment.NARROW + 1) == (_second_moment.NARROW + 1) ** 2
