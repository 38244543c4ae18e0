"""What is lowered as a function of sums, and steps on a plateau."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import make_forward_optimizer
from dsso.engines.forward import ForwardEngine
from dsso.errors import RunError
from dsso.optim.mezo import Config

CPU = torch.device("cpu")


def made(**settings: Any) -> ForwardEngine:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return ForwardEngine(net, make_forward_optimizer(net, "MeZO", Config(**settings)), CPU, 1, 4)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def counted(engine: ForwardEngine) -> Callable[[], Tensor]:
    """Right answers, and examples, as whole numbers."""
    x, y = batch()
    return lambda: torch.stack([(engine(x).argmax(-1) == y).sum(), torch.tensor(len(y))])


def wrong(sums: Tensor) -> Tensor:
    return 1 - sums[:, 0] / sums[:, 1]


def bits(engine: ForwardEngine) -> list[Tensor]:
    return [p.detach().clone().view(torch.int32) for p in engine.module.parameters()]


def test_the_value_is_a_function_of_the_sums() -> None:
    engine, seen = made(eps=0.5, lr=1e-3, directions=2), []
    closure = counted(engine)

    def value(sums: Tensor) -> Tensor:
        seen.append(sums.clone())
        return wrong(sums)

    found = engine.step(closure, value)
    assert seen[0].shape == (4, 2) and seen[0].dtype == torch.float64
    assert (seen[0][:, 1] == 64).all() and len(seen) == 1
    losses = 1 - seen[0][:, 0] / 64
    assert float(found) == pytest.approx(float(losses.mean()))
    slopes = (losses[0::2] - losses[1::2]).abs()
    assert slopes.all()
    assert engine.health()["slope"] == pytest.approx(float(slopes.mean()))  # over 2 eps = 1
    assert engine.health()["flat_steps"] == 0


def test_without_a_value_it_is_the_first_sum_over_the_second() -> None:
    one, two = made(eps=0.5, lr=1e-2), made(eps=0.5, lr=1e-2)
    for _ in range(3):
        a, b = one.step(counted(one)), two.step(counted(two), lambda sums: sums[:, 0] / sums[:, 1])
        assert a == b
    assert all(torch.equal(x, y) for x, y in zip(bits(one), bits(two), strict=True))


def test_it_learns_from_answers_alone() -> None:
    engine = made(lr=0.5, eps=0.1, directions=8, noise="rademacher")
    share = [float(engine.step(counted(engine), wrong)) for _ in range(80)]
    assert sum(share[-5:]) / 5 < 0.6 * sum(share[:5]) / 5


def test_a_plateau_leaves_the_weights_alone(tmp_path: Any) -> None:
    """Weight decay too; it is counted, the count is kept, and the next slope moves the weights."""
    engine = made(lr=0.5, eps=1e-7, weight_decay=0.1)
    before = bits(engine)
    for _ in range(3):
        engine.step(counted(engine), wrong)
    assert all(torch.equal(a, b) for a, b in zip(bits(engine), before, strict=True))
    health = engine.health()
    assert (health["flat_steps"], health["skipped_steps"], health["slope"]) == (3, 0, 0)
    engine.save_checkpoint(tmp_path, "flat", {})
    other = made(lr=0.5, eps=0.5, weight_decay=0.1)
    other.load_checkpoint(tmp_path, "flat")
    other.step(counted(other), wrong)
    assert other.health()["flat_steps"] == 3
    assert not any(torch.equal(a, b) for a, b in zip(bits(other), before, strict=True))


def test_one_direction_with_a_slope_is_no_plateau() -> None:
    engine = made(lr=0.5, directions=2)
    engine.step(counted(engine), wrong)
    flat, losses, before = engine.health()["flat_steps"], iter([1.0, 1.0, 3.0, 2.0]), bits(engine)
    engine.step(lambda: torch.tensor([next(losses), 1.0]))
    assert engine.health()["flat_steps"] == flat
    assert not any(torch.equal(a, b) for a, b in zip(bits(engine), before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_are_skipped_whatever_the_value(bad: float) -> None:
    engine = made(lr=0.5, eps=0.5)
    engine.step(counted(engine), wrong)
    before = bits(engine)
    engine.step(lambda: torch.tensor([1.0, bad]), lambda sums: sums[:, 0] * torch.arange(len(sums)))
    assert all(torch.equal(a, b) for a, b in zip(bits(engine), before, strict=True))
    assert engine.health()["skipped_steps"] == 1


def test_closures_and_values_that_cannot_be_used() -> None:
    def sums(sums: Tensor) -> Tensor:
        return sums

    for found in (torch.tensor(1.0), torch.ones(2, 2), torch.ones(0), 1.0):
        with pytest.raises(RunError, match="must return sums for `value`"):
            made().step(lambda found=found: found, wrong)
    engine = made()
    with pytest.raises(RunError, match=r"value\(sums\) must return one number for each evaluation") as caught:
        engine.step(counted(engine), sums)
    assert "got: 'shape (2, 2)'" in str(caught.value)
    assert "a tensor of shape (2,), from sums of shape (2, 2)" in str(caught.value)
    before = bits(engine)
    with pytest.raises(RunError, match=r"allowed: a tensor of shape \(2,\)"):
        engine.step(lambda: torch.ones(3), wrong)
    assert all(torch.equal(a, b) for a, b in zip(bits(engine), before, strict=True))
    with pytest.raises(RunError, match="two numbers: the sum of the losses"):
        engine.step(lambda: torch.ones(3))
