"""PSGD against its criterion in float64, and what the fitting does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.curvature.quality import quality
from dsso.engines import estimates
from dsso.engines.single import SingleEngine
from dsso.errors import RunError
from dsso.optim import psgd
from dsso.optim._estimating import probe_of
from dsso.optim.psgd import Config, fit
from dsso.parallel import noise
from tests.conformance.methods import made

PLAIN: dict[str, Any] = {"base": {"type": "SGD", "momentum": 0.0}, "stagger": False, "refresh_interval": 1}


def triangular(side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(side).double() + 0.3 * torch.randn(side, side, generator=generator).double().triu()


def criterion(factors: list[Tensor], h: Tensor, v: Tensor) -> Tensor:
    """h^T P h + v^T P^-1 v with P as one dense matrix."""
    p = torch.ones(1, 1, dtype=torch.float64)
    for q in factors:
        p = torch.kron(p, q.mT @ q)
    h, v = h.reshape(-1), v.reshape(-1)
    return h @ p @ h + v @ torch.linalg.solve(p, v)


@pytest.mark.parametrize("sides", [(4,), (3, 5), (2, 3, 4)])
def test_a_fit_is_a_step_down_the_criterion(sides: tuple[int, ...]) -> None:
    """Q goes to Q + E Q with E upper triangular: E has the direction of minus the criterion's gradient."""
    torch.manual_seed(1)
    h, v = torch.randn(sides).double(), torch.randn(sides).double()
    factors = [triangular(side, side).requires_grad_() for side in sides]
    criterion(factors, h, v).backward()
    rate = 1e-3
    with torch.no_grad():
        fresh = fit([q.detach() for q in factors], tuple(range(len(sides))), h, v, rate)
    for old, new in zip(factors, fresh, strict=True):
        assert old.grad is not None
        assert new.tril(-1).abs().max() == 0
        # Balancing multiplies by a number: what is off the diagonal of a (I + E) has the direction of E's.
        moved = torch.linalg.solve_triangular(old.detach(), new, upper=True, left=False).triu(1).flatten()
        downhill = -(old.grad @ old.detach().mT).triu(1).flatten()
        assert nn.functional.cosine_similarity(moved, downhill, dim=0) > 1 - 1e-9
    with torch.no_grad():
        assert criterion(fresh, h, v) < criterion(factors, h, v)


def test_the_equations() -> None:
    """The step of a matrix, written down."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False).double()
    config = Config(**PLAIN, lr=0.1, damping=0.01, max_rms=0.7, beta1=0.6)
    engine = made("PSGD", net, **PLAIN, **{"lr": 0.1, "damping": 0.01, "max_rms": 0.7, "beta1": 0.6})
    seed = engine.optimizer.method._places["weight/0"][0].seeds[0]
    weight = net.weight.detach().clone()
    mean = torch.zeros(3, 4).double()
    left, right = torch.eye(3).double(), torch.eye(4).double()
    for t in range(4):
        x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        engine.backward(nn.functional.mse_loss(engine(x), y), terms=6)
        engine.step()
        gradient = 2 / 18 * (x @ weight.mT - y).mT @ x
        mean = 0.6 * mean + 0.4 * gradient
        g = mean / (1 - 0.6 ** (t + 1))
        rms = g.square().mean().sqrt()
        if not t:
            left, right = left * rms**-0.25, right * rms**-0.25
        v = torch.randn(3, 4, generator=torch.Generator().manual_seed((seed << 24) + t), dtype=torch.float64)
        a = left @ (g + config.damping * rms * v) @ right.mT
        b = torch.linalg.inv(left).mT @ v @ torch.linalg.inv(right)
        fresh = []
        for q, one, two in ((left, a, b), (right, a.mT, b.mT)):
            between = (one @ one.mT - two @ two.mT).triu()
            fresh.append(q - config.precondition_lr * between @ q / psgd._norm(one, two))
        size = [q.abs().max() for q in fresh]
        even = (size[0] * size[1]) ** 0.5
        left, right = fresh[0] * even / size[0], fresh[1] * even / size[1]
        u = left.mT @ left @ g @ right.mT @ right
        weight = weight - 0.1 * u * min(1.0, float(0.7 / u.square().mean().sqrt()))
        torch.testing.assert_close(net.weight.detach(), weight, rtol=1e-10, atol=1e-10)


def test_the_norm_is_within_a_factor_of_two_from_below() -> None:
    for seed in range(5):
        one, two = triangular(20, seed), triangular(20, seed + 100)[:, :7]
        exact = torch.linalg.eigvalsh(one @ one.mT + two @ two.mT)[-1]
        assert 0.5 * exact < psgd._norm(one, two) <= exact * (1 + 1e-9)


def test_gradients_are_whitened() -> None:
    """Of a stationary gradient with badly scaled sides, P E[g g^T] P is close to I."""
    torch.manual_seed(0)
    left, right = torch.logspace(0, -2, 6), torch.logspace(0, -1, 4)
    factors = [torch.eye(6) * 3, torch.eye(4) * 3]
    updates = []
    for turn in range(3000):
        g = torch.randn(6, 4) * left.unsqueeze(1) * right
        factors = fit(factors, (0, 1), g, torch.randn(6, 4), 0.1 if turn < 1500 else 0.02)
        if turn >= 2500:
            updates.append(factors[0].mT @ factors[0] @ g @ factors[1].mT @ factors[1])
    spread = torch.stack(updates).square().mean(0).sqrt()
    assert spread.max() / spread.min() < 2
    assert 0.7 < spread.mean() < 1.4


def test_what_a_gradient_does_not_reach_is_not_amplified() -> None:
    """Rank one, for long: the damping keeps the other directions of P finite."""
    torch.manual_seed(0)
    net = nn.Linear(5, 4, bias=False)
    engine = made("PSGD", net, **PLAIN, lr=1e-9)
    x, y = torch.randn(1, 5), torch.zeros(1, 4)
    for _ in range(400):
        engine.backward(nn.functional.mse_loss(engine(x), y), terms=1)
        engine.step()
    block = engine.optimizer.method._places["weight/0"][0]
    largest = max(float(torch.linalg.matrix_norm(q, 2)) for q in (f[0] for f in block._factors))
    smallest = min(
        1 / float(torch.linalg.matrix_norm(torch.linalg.inv(q), 2)) for q in (f[0] for f in block._factors)
    )
    assert largest / smallest < 1e3


def test_a_failed_fit_keeps_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(5, 4, bias=False)
    engine = made("PSGD", net, **PLAIN)

    def step() -> Tensor:
        engine.backward(engine(torch.randn(3, 5)).square().mean(), terms=3)
        engine.step()
        found: Tensor = engine.optimizer.method.state_tensors()["weight/0/factor0"].clone()
        return found

    good = step()
    monkeypatch.setattr(psgd, "fit", lambda factors, *_: [q * float("inf") for q in factors])
    assert torch.equal(step(), good)
    assert engine.health()["factor_failures"] == 1
    monkeypatch.undo()
    assert not torch.equal(step(), good)


# -- the Newton form ---------------------------------------------------------------------------------------------


def newton_step(engine: SingleEngine, x: Tensor, y: Tensor, poison: bool = False) -> None:
    """A window with what it wants to know of the Hessian; `poison`: which it does not learn."""

    def loss(scores: Tensor) -> Tensor:
        return nn.functional.mse_loss(scores, y)

    batch = estimates.MicroBatch(
        len(x), lambda: engine(x) * (torch.nan if poison else 1.0), loss, lambda scores: loss(scores)
    )
    estimates.run(engine, lambda: [batch])
    engine.backward(loss(engine(x)), terms=len(x))
    engine.step()


@pytest.mark.parametrize("products", ["double_backward", "difference"])
def test_the_equations_of_the_newton_form(products: str) -> None:
    """The loss is quadratic, so differences are exact but for rounding."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False).double()
    given = {"lr": 0.1, "damping": 0.01, "max_rms": None, "beta1": 0.0, "probe_seed": 5}
    engine = made("PSGD", net, **PLAIN, form="newton", products=products, **given)
    weight = net.weight.detach().clone()
    left, right = torch.eye(3).double(), torch.eye(4).double()
    for t in range(4):
        x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        newton_step(engine, x, y)
        v = torch.zeros(12, dtype=torch.float64)
        noise.add(v, v, probe_of(5, "weight", t), 0, 1.0)
        assert set(v.tolist()) == {1.0, -1.0}
        v = v.view(3, 4)
        h = 2 / 18 * v @ x.mT @ x
        level = h.square().mean().sqrt()
        if not t:
            left, right = left * level**-0.25, right * level**-0.25
        left, right = fit([left, right], (0, 1), h + 0.01 * level * v, v, 0.1)
        gradient = 2 / 18 * (x @ weight.mT - y).mT @ x
        weight = weight - 0.1 * left.mT @ left @ gradient @ right.mT @ right
        torch.testing.assert_close(net.weight.detach(), weight, rtol=1e-7, atol=1e-9)


def test_the_newton_form_inverts_the_curvature() -> None:
    """Of a quadratic with Hessian 1 (x) C, badly scaled, c(P) is at its least before long."""
    torch.manual_seed(0)
    net = nn.Linear(6, 4, bias=False).double()
    given = {"lr": 1e-9, "damping": 0.0, "products": "double_backward", "precondition_lr": 0.05}
    engine = made("PSGD", net, **PLAIN, form="newton", **given)
    scale = torch.logspace(0, -1, 6).double()
    x = torch.linalg.qr(torch.randn(6, 6).double())[0] * scale
    for _ in range(1500):
        newton_step(engine, x, torch.zeros(6, 4).double())
    factors = engine.optimizer.method.state_tensors()
    found = [factors[f"weight/0/factor{dim}"] for dim in (0, 1)]
    hessian = 2 / 24 * x.mT @ x
    moment = [torch.eye(4).double(), hessian @ hessian]
    assert quality([q.mT @ q for q in found], moment) < 1.05
    assert quality([torch.eye(4), torch.eye(6)], moment) > 2.0


def test_an_estimate_that_is_not_finite_is_made_again() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3, bias=False).double()
    given = {"refresh_interval": 5, "form": "newton"}
    engine = made("PSGD", net, **{**PLAIN, **given})
    method = engine.optimizer.method
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    wanted = []
    for t in range(8):
        wanted.append(engine.wants_estimate() is not None)
        newton_step(engine, x, y, poison=t in (0, 5))
        assert torch.isfinite(net.weight).all()
    assert wanted == [True, True, False, False, False, True, True, False]
    assert method.state_tensors()["weight/0/turns"] == 2


def test_a_loop_without_estimates_is_told_so() -> None:
    net = nn.Linear(4, 3, bias=False)
    engine = made("PSGD", net, **PLAIN, form="newton")
    engine.backward(engine(torch.ones(2, 4)).sum(), terms=2)
    with pytest.raises(RunError, match="needs an estimate"):
        engine.step()


def test_products_mean_nothing_to_whitening() -> None:
    for given in ({"products": "double_backward"}, {"difference": 1e-2}, {"probe_seed": 1}):
        with pytest.raises(ValueError, match="without form = newton"):
            Config(**given)
