"""What estimates of curvature ask for on average, against real steps; what a plan makes of it."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from dsso.engines import estimates, make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim import resolve
from dsso.optim._estimation import Estimation
from dsso.plan import text
from tests.plan.cases import other, planned, recipe

CPU = torch.device("cpu")
CLASSES, COUNT, STEPS = 3, 8, 12
HALVES = {"estimate_interval": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sampled": ("SOPHIA", {"estimate_interval": 3}),
    "hutchinson": ("SOPHIA", {"estimator": "hutchinson", **HALVES}),
    "hutchinson twice": ("SOPHIA", {"estimator": "hutchinson", "products": "double_backward", **HALVES}),
    "newton": ("PSGD", {"form": "newton", "refresh_interval": 4}),
    "newton twice": ("PSGD", {"form": "newton", "products": "double_backward", "refresh_interval": 4}),
    "whitening": ("PSGD", {"refresh_interval": 4}),
    "products": ("GAUSS_NEWTON", {"iterations": 3}),
    "products twice": ("GAUSS_NEWTON", {"iterations": 3, "products": "double_backward"}),
    "blocks": ("GAUSS_NEWTON", {"iterations": 2, "block_parameters": 100}),
    "judged": ("KFAC", {"adaptive_damping": {"interval": 4}}),
    "judged products": ("GAUSS_NEWTON", {"iterations": 1, "adaptive_damping": {"interval": 6}}),
}


def counted(kind: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Estimation:
    """Real steps of a process by itself, and what they did beside their own windows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    config = resolve(kind).Config(**given)
    engine = SingleEngine(net, make_optimizer(net, kind, config, CPU), CPU, 1, COUNT)
    engine.train()
    done: Counter[str] = Counter()
    window, displaced, direction = estimates._window, type(engine).displaced, type(engine).whole_direction
    along = type(engine).along_the_step

    def windows(*arguments: Any) -> None:
        done["windows"] += 1
        window(*arguments)

    def counting(what: str, real: Any) -> Any:
        @contextmanager
        def within(*arguments: Any) -> Any:
            done[what] += 1
            with real(*arguments) as found:
                yield found

        return within

    def directions(self: Any) -> Any:
        done["directions"] += 1
        done["twice"] += 1
        return direction(self)

    monkeypatch.setattr(estimates, "_window", windows)
    monkeypatch.setattr(type(engine), "displaced", counting("displacements", displaced))
    monkeypatch.setattr(type(engine), "along_the_step", counting("displacements", along))
    monkeypatch.setattr(type(engine), "whole_direction", directions)
    net.register_forward_hook(lambda *_: done.update(forwards=int(not torch.is_grad_enabled())))

    x, y = torch.randn(COUNT, 4), torch.randint(CLASSES, (COUNT,))

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(scores, y)

    batch = estimates.MicroBatch(COUNT, lambda: engine(x), loss, loss)
    for _ in range(STEPS):
        estimates.run(engine, lambda: [batch])
        engine.backward(batch.loss(batch.scores()), terms=COUNT)
        engine.step()
        estimates.judge(engine, lambda: [batch])
    owned = getattr(config, "form", None) == "newton"
    found = {name: count / STEPS for name, count in done.items()}
    # Two windows of differences are one product.
    products = found.get("windows", 0.0) / (1 if "directions" in found else 2)
    return Estimation(**found, gathers=products if owned else 0.0)


@pytest.mark.parametrize("name", CASES)
def test_estimates_ask_for_what_was_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, given = CASES[name]
    assert resolve(kind).Config(**given).estimation(CLASSES) == counted(kind, given, monkeypatch)


@pytest.mark.parametrize("engine", ["ddp", "zero-0", "zero-1", "zero-2", "zero-3", "fsdp2"])
@pytest.mark.parametrize("name", ["sampled", "hutchinson", "newton", "products"])
def test_a_plan_counts_them(engine: str, name: str) -> None:
    """A window sends what a step sends; weights that are displaced go to those who hold none of them."""
    kind, given = CASES[name]
    raw = other(kind, recipe(engine, model="tiny-bert"), **given)
    found = planned(raw, 4)
    wire, config = found.wire, resolve(kind).Config(**given)
    asked = config.estimation(2)
    least = asked.windows * (wire.gradients + wire.weights)
    assert wire.estimates >= int(least) > 0
    assert wire.per_step >= wire.gradients + wire.weights + wire.exchange + wire.estimates
    # Under FSDP2 displaced weights are gathered by the passes that read them.
    beside = asked.forwards + asked.gathers if engine == "fsdp2" else asked.displacements
    more = engine not in ("ddp", "zero-0") and beside > 0
    assert (wire.estimates > least + 1) == more
    assert found.operations.estimates >= asked.windows * found.operations.training
    assert "estimates" in text(found)


def test_a_direction_goes_to_all_ranks_where_it_lies_in_pieces() -> None:
    kind, given = CASES["products twice"]

    def of(engine: str) -> int:
        wire = planned(other(kind, recipe(engine, model="tiny-bert"), **given), 4).wire
        return wire.estimates - int(4 * (wire.gradients + wire.weights))

    found = planned(other(kind, recipe("zero-2", model="tiny-bert"), **given), 4)
    assert of("ddp") == 0
    # Three products, pieces of a quarter for three others.
    assert of("zero-2") == pytest.approx(3 * 4 * 0.75 * found.trained, rel=0.05)


def test_methods_without_estimates_have_none() -> None:
    found = planned(recipe("zero-2", model="tiny-bert"), 4)
    assert (found.wire.estimates, found.operations.estimates) == (0, 0.0)
    assert "estimates" not in text(found)
