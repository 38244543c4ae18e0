"""SOAP against the published algorithm in float64, and what its bases do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.linalg import roots
from dsso.optim.soap import Config
from tests.conformance.methods import made, weights

PLAIN: dict[str, Any] = {"base": {"type": "SGD", "momentum": 0.0}, "stagger": False}


class Matrices(nn.Module):
    """A convolution of which two sides merge, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one = nn.Conv1d(2, 5, 3, bias=False), nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(torch.tanh(self.conv(x)).mean(-1))


def model() -> Matrices:
    torch.manual_seed(0)
    return Matrices().double()


def loss(net: Any, seed: int) -> Tensor:
    """A regression: without a ridge, null directions of a gradient would be rounding in either code."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 2, 6, generator=generator), torch.randn(8, 5, generator=generator)
    return nn.functional.mse_loss(net(x.double()), y.double())


def step(engine: Any, seed: int) -> None:
    engine.backward(loss(engine, seed), terms=8)
    engine.step()


def turned(s: Tensor, q: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    shift = ridge * s.trace() / len(s)
    held = [0.0 if ridge else float(column @ s @ column) for column in q.T]
    order = torch.tensor(sorted(range(len(s)), key=lambda i: -held[i]))
    return torch.linalg.qr((s + shift * torch.eye(len(s)).double()) @ q[:, order])[0], order


def twin(steps: int, **settings: Any) -> dict[str, Tensor]:
    """The algorithm written down for whole matrices, every side rotated, bases renewed at every step."""
    c = Config(**PLAIN, **settings)
    net = model()
    kept: dict[str, Any] = {}
    for t in range(steps):
        net.zero_grad()
        loss(net, t).backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                assert p.grad is not None
                g = p.grad.view(5, 6) if p.dim() == 3 else p.grad
                left, right = g @ g.mT, g.mT @ g
                if name not in kept:
                    s = [(1 - c.beta2) * left, (1 - c.beta2) * right]
                    if c.ridge:
                        q = [turned(one, torch.eye(len(one)).double(), c.ridge)[0] for one in s]
                    else:
                        q = [torch.linalg.eigh(one)[1].flip(1) for one in s]
                    kept[name] = [s, q, torch.zeros_like(g), torch.zeros_like(g)]
                    continue
                s, q, m, v = kept[name]
                s = [c.beta2 * a + (1 - c.beta2) * b for a, b in zip(s, (left, right), strict=True)]
                m = c.beta1 * m + (1 - c.beta1) * g
                v = c.beta2 * v + (1 - c.beta2) * (q[0].mT @ g @ q[1]) ** 2
                root = v.sqrt().clamp_min(c.floor * v.sqrt().max())
                u = q[0] @ ((q[0].mT @ m @ q[1]) / (root + c.eps)) @ q[1].mT
                p -= c.lr * (u * (1 - c.beta2**t) ** 0.5 / (1 - c.beta1**t)).reshape(p.shape)
                (q0, o0), (q1, o1) = (turned(a, b, c.ridge) for a, b in zip(s, q, strict=True))
                kept[name] = [s, [q0, q1], m, v[o0][:, o1]]
    return {n: p.detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize(
    "settings", [{}, {"ridge": 0.0, "floor": 1e-2, "beta1": 0.8}], ids=["ridge", "published"]
)
def test_the_equations(settings: dict[str, Any]) -> None:
    engine = made("SOAP", model(), **{**PLAIN, "lr": 0.01, "sides": "all", "refresh_interval": 1, **settings})
    before = weights(engine)
    for seed in range(6):
        step(engine, seed)
        if not seed:
            assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    wanted = twin(6, lr=0.01, **settings)
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-7)


def test_of_a_long_block_the_short_side_is_rotated() -> None:
    torch.manual_seed(0)
    net = nn.Linear(20, 3, bias=False)
    engine = made("SOAP", net, **PLAIN, aspect=3.0)
    engine.backward(net(torch.randn(4, 20)).square().mean(), terms=4)
    engine.step()
    sides = {
        name: tuple(t.shape) for name, t in engine.optimizer.method.state_tensors().items() if "basis" in name
    }
    assert sides == {"weight/0/basis0": (3, 3)}


def test_moments_follow_a_basis_that_is_made_anew() -> None:
    """Where two bases are the same but for the order, so are the moments; no energy is lost in any case."""
    engine = made("SOAP", model(), **PLAIN, eigh_every=2, refresh_interval=1, floor=0.0)
    for seed in range(3):
        step(engine, seed)
    block = engine.optimizer.method._places["one.weight/0"][0]
    before = block._square.sum()
    block.refresh(0)
    torch.testing.assert_close(block._square.sum(), before)
    q = block._bases[0][0]
    torch.testing.assert_close(q.mT @ q, torch.eye(5).double())


def test_a_failed_turn_keeps_the_last_good_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made("SOAP", model(), **PLAIN, refresh_interval=1)
    step(engine, 0)
    good = engine.optimizer.method.state_tensors()["one.weight/0/basis0"].clone()
    monkeypatch.setattr(roots, "turned_basis", lambda x, q, ridge: (q * float("nan"), torch.arange(len(q))))
    step(engine, 1)
    assert torch.equal(engine.optimizer.method.state_tensors()["one.weight/0/basis0"], good)
    assert engine.health()["factor_failures"] == 2
    monkeypatch.undo()
    step(engine, 2)
    assert not torch.equal(engine.optimizer.method.state_tensors()["one.weight/0/basis0"], good)


@pytest.mark.parametrize("rows", [2, 8])
def test_the_step_does_not_follow_rounding(rows: int) -> None:
    """Two classes give a gradient of rank 1 with equal diagonal: bases and steps move by rounding, not by more."""
    found = []
    for order in (slice(None), [3, 1, 2, 0, 7, 5, 6, 4]):
        torch.manual_seed(0)
        net = nn.Linear(6, rows, bias=False)
        engine = made("SOAP", net, **PLAIN, sides="all")
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            x, y = torch.randn(8, 6, generator=generator)[order], torch.arange(8)[order] % rows
            engine.backward(nn.functional.cross_entropy(engine(x), y), terms=8)
            engine.step()
        found.append(net.weight.detach().clone())
    assert (found[0] - found[1]).norm() <= 3e-6 * found[0].norm()
    assert not torch.equal(found[0], found[1])
