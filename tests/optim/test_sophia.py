"""The equations of Sophia against a dense twin, and its estimate against the exact diagonal, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import estimates, make_optimizer
from dsso.engines.single import SingleEngine
from dsso.errors import RunError
from dsso.optim.sophia import DIAGONAL, FIRST, Config
from dsso.parallel import noise

CPU = torch.device("cpu")
WIDE, CLASSES = 4, 3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def made(net: nn.Module, gas: int = 1, scheduler: Any = None, **given: Any) -> SingleEngine:
    config = Config(**{"lr": 0.1, "floor": 0.0, "estimate_interval": 1, **given})
    optimizer = make_optimizer(net, "SOPHIA", config, CPU)
    made_by = None if scheduler is None else scheduler(optimizer)
    engine = SingleEngine(net, optimizer, CPU, gas, 1, made_by)
    engine.train()
    return engine


def state(engine: SingleEngine, name: str) -> dict[str, Tensor]:
    """What is kept, by parameter."""
    table = engine.optimizer.table
    return {
        span.name: view.clone() for kind, span, view in engine.optimizer.views(table.ranks[0]) if kind == name
    }


def loss_sum(net: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(net(x).flatten(0, -2), y.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDE, generator=generator).double(), torch.randint(
        CLASSES, (count,), generator=generator
    )


def drawn(net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        p = net(x).flatten(0, -2).softmax(-1)
    return torch.multinomial(p, 1, generator=generator).view(x.shape[:-1])


def test_steps_are_those_of_the_equations() -> None:
    net, twin = model(), model()
    given = {"beta1": 0.8, "beta2": 0.7, "gamma": 0.3, "eps": 1e-9, "floor": 0.05, "estimate_interval": 3}
    engine = made(net, **given)
    m = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    h = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    every = torch.ones(10).double()
    mean = 0.0
    for step in range(8):
        x, y = tokens(10, step)
        assert (engine.wants_estimate() is not None) == (step % 3 == 0)
        if engine.wants_estimate():
            labels = drawn(net, x, torch.Generator().manual_seed(step))
            with engine.estimating():
                engine.backward(loss_sum(engine, x, labels, every) / 10, terms=10)
                engine.step()
            found = torch.autograd.grad(loss_sum(twin, x, labels, every) / 10, list(twin.parameters()))
            for (name, _), q in zip(twin.named_parameters(), found, strict=True):
                h[name] = 0.7 * h[name] + 0.3 * 10 * q.square()
            mean = float(torch.cat([one.flatten() for one in h.values()]).mean())
        engine.backward(loss_sum(engine, x, y, every) / 10, terms=10)
        engine.step()
        found = torch.autograd.grad(loss_sum(twin, x, y, every) / 10, list(twin.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(twin.named_parameters(), found, strict=True):
                m[name] = 0.8 * m[name] + 0.2 * g
                p -= 0.1 * (m[name] / (0.3 * h[name]).clamp_min(0.3 * 0.05 * mean)).clamp(-1, 1)
    for (name, p), wanted in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state(engine, DIAGONAL)[name], h[name].flatten(), rtol=1e-10, atol=0.0)
        torch.testing.assert_close(state(engine, FIRST)[name], m[name].flatten(), rtol=1e-10, atol=1e-15)
    health = engine.health()
    assert health["estimates"] == 3
    assert 0 < health["win_rate"] < 1


def exact_diagonal(net: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Of the Gauss-Newton matrix of the mean loss over the tokens that count: mean of J^T (diag p - p p^T) J."""
    parameters = list(net.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters)).double()
    for row in x[mask > 0]:
        logits = net(row[None])[0]
        jacobian = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(z, parameters, retain_graph=True)])
                for z in logits
            ]
        )
        p = logits.detach().softmax(-1)
        total += torch.einsum("cp,cd,dp->p", jacobian, torch.diag(p) - torch.outer(p, p), jacobian)
    return total / float(mask.sum())


def test_the_estimate_is_the_diagonal_of_the_gauss_newton_matrix() -> None:
    """With 23 of 48 tokens masked, in two micro-batches of which one has more tokens that count than the other."""
    net = model()
    x, _ = tokens(48, 1)
    mask = torch.zeros(48).double()
    mask[torch.randperm(48, generator=torch.Generator().manual_seed(2))[:25]] = 1.0
    parts = [(x[:14], mask[:14]), (x[14:], mask[14:])]
    assert mask.sum() == 25
    assert abs(float(parts[0][1].sum() - parts[1][1].sum())) > 4
    engine = made(net, gas=2, beta2=0.0, lr=1e-30)
    generator = torch.Generator().manual_seed(3)
    draws = 4000
    right = torch.zeros(sum(p.numel() for p in net.parameters())).double()
    counted, single = torch.zeros_like(right), torch.zeros_like(right)
    terms = 25 / 2
    for _ in range(draws):
        alone = []
        # As at a step that needs one, whatever the interval.
        with engine.estimating():
            for part_x, part_mask in parts:
                labels = drawn(net, part_x, generator)
                loss = loss_sum(engine, part_x, labels, part_mask) / terms
                alone.append(torch.autograd.grad(loss / 2, list(net.parameters()), retain_graph=True))
                engine.backward(loss, terms=terms)
                engine.step()
        h = torch.cat(list(state(engine, DIAGONAL).values()))
        right += h / draws
        counted += h * (48 / 25) / draws
        single += h * (terms / 25) / draws
    wanted = exact_diagonal(net, x, mask)
    assert float(right.sum() / wanted.sum()) == pytest.approx(1.0, abs=0.03)
    order = wanted.argsort(descending=True)[:10]
    torch.testing.assert_close(right[order], wanted[order], rtol=0.15, atol=0.0)
    # Other forms are found out: masked tokens counted, the terms of one micro-batch or rank instead of all.
    assert float(counted.sum() / wanted.sum()) > 1.8
    assert float(single.sum() / wanted.sum()) < 0.6
    # Squares before the sum come to the same in the mean, but not in a draw: sums come first.
    q = [sum(gs) for gs in zip(*alone, strict=True)]
    one_draw = 25 * torch.cat([g.flatten() for g in q]).square()
    torch.testing.assert_close(
        torch.cat(list(state(engine, DIAGONAL).values())), one_draw, rtol=1e-9, atol=0.0
    )
    squares = 25 * sum(torch.cat([g.flatten() for g in one]).square() for one in alone)
    assert (squares - one_draw).norm() > 0.1 * one_draw.norm()


def test_a_window_of_estimation_is_no_step() -> None:
    net = model()
    engine = made(
        net,
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        momentum=0.5,
    )
    x, y = tokens(10, 0)
    every = torch.ones(10).double()
    before = [p.detach().clone() for p in net.parameters()]
    with engine.estimating():
        engine.backward(loss_sum(engine, x, y, every) / 10, terms=10)
        engine.step()
    assert all(torch.equal(p, kept) for p, kept in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    assert (engine.global_steps, engine.optimizer.steps, engine.lr()) == (0, 0, 0.1)
    engine.backward(loss_sum(engine, x, y, every) / 10, terms=10)
    engine.step()
    assert (engine.global_steps, engine.optimizer.steps, engine.lr()) == (1, 1, 0.05)


def test_an_estimate_that_is_not_finite_is_left_out() -> None:
    engine = made(model())
    x, y = tokens(10, 0)
    every = torch.ones(10).double()
    for scale in (1.0, float("nan")):
        with engine.estimating():
            engine.backward(loss_sum(engine, x, y, every) * scale / 10, terms=10)
            engine.step()
        found = state(engine, DIAGONAL)
        assert all(h.isfinite().all() and h.any() for h in found.values())
    engine.backward(loss_sum(engine, x, y, every) / 10, terms=10)
    engine.step()
    assert all(p.isfinite().all() for p in engine.module.parameters())


def test_a_loop_that_leaves_out_the_estimate_is_told() -> None:
    engine = made(model(), estimate_interval=[[0, 2]])
    x, y = tokens(10, 0)
    every = torch.ones(10).double()
    engine.backward(loss_sum(engine, x, y, every) / 10, terms=10)
    with pytest.raises(RunError, match=r"engine\.step: step 0 needs an estimate"):
        engine.step()


def test_half_a_window_is_told() -> None:
    engine = made(model(), gas=2)
    x, y = tokens(10, 0)
    with pytest.raises(RunError, match="no end"), engine.estimating():
        engine.backward(loss_sum(engine, x, y, torch.ones(10).double()) / 10, terms=10)
        engine.step()
    engine = made(model(), gas=2)
    engine.backward(loss_sum(engine, x, y, torch.ones(10).double()) / 10, terms=10)
    with pytest.raises(RunError, match="is open"), engine.estimating():
        pass


def test_no_element_moves_further_than_the_learning_rate() -> None:
    net = model()
    engine = made(net, lr=0.01, gamma=1e-6)
    x, y = tokens(10, 0)
    every = torch.ones(10).double()
    before = [p.detach().clone() for p in net.parameters()]
    with engine.estimating():
        engine.backward(loss_sum(engine, x, drawn(net, x, torch.Generator()), every) / 10, terms=10)
        engine.step()
    engine.backward(loss_sum(engine, x, y, every) / 10, terms=10)
    engine.step()
    moved = torch.cat(
        [(p.detach() - kept).flatten() for p, kept in zip(net.parameters(), before, strict=True)]
    )
    assert float(moved.abs().max()) == pytest.approx(0.01, rel=1e-9)
    assert engine.health()["win_rate"] < 0.1


def hessian(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[int]]:
    """Of the mean loss, [P, P], and the elements of every parameter."""
    named = dict(net.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = [part.view(p.shape) for part, p in zip(flat.split(sizes), named.values(), strict=True)]
        scores = torch.func.functional_call(net, dict(zip(named, parts, strict=True)), (x,))
        return nn.functional.cross_entropy(scores, y)

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    return torch.autograd.functional.hessian(loss, flat), sizes


def estimated(engine: SingleEngine, x: Tensor, y: Tensor) -> None:
    """Whatever windows the method asks for."""

    def batch(part_x: Tensor, part_y: Tensor) -> estimates.MicroBatch:
        count = len(part_x)
        return estimates.MicroBatch(
            count,
            lambda: engine(part_x),
            lambda scores: nn.functional.cross_entropy(scores, part_y),
            lambda scores: scores.sum() * math.nan,
        )

    gas = engine.gradient_accumulation_steps
    parts = list(zip(x.chunk(gas), y.chunk(gas), strict=True))
    estimates.run(engine, lambda: [batch(*part) for part in parts])


@pytest.mark.parametrize("gas", [1, 2])
@pytest.mark.parametrize(("products", "close"), [("double_backward", 1e-9), ("difference", 1e-5)])
def test_hutchinson_is_the_probe_times_the_hessian(products: Any, close: float, gas: int) -> None:
    net = model()
    engine = made(net, gas, beta2=0.5, estimator="hutchinson", products=products, probe_seed=3)
    x, y = tokens(10, 0)
    wanted = torch.zeros(sum(p.numel() for p in net.parameters())).double()
    for step in range(3):
        h, _ = hessian(net, x, y)
        z = torch.cat(
            [
                noise.sample(noise.Direction(3, name, step, "rademacher"), 0, p.numel())
                for name, p in net.named_parameters()
            ]
        ).double()
        wanted = 0.5 * wanted + 0.5 * z * (h @ z)
        estimated(engine, x, y)
        found = torch.cat(list(state(engine, DIAGONAL).values()))
        assert (found - wanted).norm() <= close * wanted.norm()
        for part_x, part_y in zip(x.chunk(gas), y.chunk(gas), strict=True):
            engine.backward(nn.functional.cross_entropy(engine(part_x), part_y), terms=len(part_x))
            engine.step()
    assert engine.health()["estimates"] == 3


def test_hutchinson_has_the_diagonal_as_its_mean() -> None:
    net = model()
    x, y = tokens(10, 0)
    h, _ = hessian(net, x, y)
    engine = made(net, lr=1e-30, beta2=0.0, estimator="hutchinson", products="double_backward")
    mean, draws = torch.zeros(len(h)).double(), 3000
    for step in range(draws):
        engine.optimizer.steps = step  # another probe
        estimated(engine, x, y)
        mean += torch.cat(list(state(engine, DIAGONAL).values())) / draws
    # The variance of element i in one draw is the sum of the squares of H beside the diagonal in row i.
    beside = h - torch.diag(h.diagonal())
    error = float(beside.norm()) / draws**0.5
    assert 0.5 * error < (mean - h.diagonal()).norm() < 1.5 * error
    assert error < 0.1 * h.diagonal().norm()
    assert float(mean.sum() / h.diagonal().sum()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("products", ["double_backward", "difference"])
def test_a_product_that_is_not_finite_is_left_out(products: Any, lost: int) -> None:
    engine = made(model(), estimator="hutchinson", products=products)
    x, y = tokens(10, 0)
    estimated(engine, x, y)
    kept = state(engine, DIAGONAL)
    own, calls = engine.backward, [0]

    def breaking(loss: Tensor, terms: Any = None) -> None:
        own(loss * math.nan if calls[0] == lost or products == "double_backward" else loss, terms)
        calls[0] += 1

    engine.optimizer.steps = 1
    engine.backward = breaking  # type: ignore[method-assign]
    estimated(engine, x, y)
    assert calls[0] == (2 if products == "difference" else 1)
    assert all(torch.equal(h, kept[name]) for name, h in state(engine, DIAGONAL).items())
