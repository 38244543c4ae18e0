"""The equations of EKFAC against a dense twin, the exact Fisher and curvlinops, all in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.linalg import roots
from dsso.linalg.smooth import neighbours_mean
from dsso.optim._eigen import EigenBlock
from dsso.optim.ekfac import Config

CPU = torch.device("cpu")
CLASSES, N = 3, 12


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES, bias=False)).double()


def data(seed: int = 1, count: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator).double()
    return x, torch.randint(CLASSES, (count,), generator=generator)


def made(net: nn.Module, **given_: Any) -> SingleEngine:
    settings = {
        "lr": 0.1,
        "momentum": 0.0,
        "clip": "none",
        "smoothing": 0.0,
        "factor_interval": 1,
        "inverse_interval": 1,
        "damping": 0.1,
        "damping_floor": 0.0,
        **given_,
    }
    engine = SingleEngine(net, make_optimizer(net, "EKFAC", Config(**settings), CPU), CPU, 1, N)
    engine.train()
    return engine


def step(engine: SingleEngine, x: Tensor, y: Tensor) -> None:
    engine.backward(nn.functional.cross_entropy(engine(x), y), terms=len(x))
    engine.step()


def whole(layer: nn.Linear, what: str = "data") -> Tensor:
    """Weight or its gradient with the bias as the last column."""
    parts = [getattr(p, what) for p in (layer.weight, layer.bias) if p is not None]
    return torch.cat([p.view(layer.out_features, -1) for p in parts], 1)


def rows(net: nn.Sequential, x: Tensor, y: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Inputs (with a one for the bias) and output gradients of one loss term each, of both layers."""
    out = {}
    for index in (0, 2):
        layer = net[index]
        hidden = net[:index](x).detach()
        at = layer(hidden).detach().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(net[index + 1 :](at), y, reduction="sum"), at)
        if layer.bias is not None:
            hidden = torch.cat([hidden, torch.ones(len(x), 1).double()], 1)
        out[index] = (hidden, g)
    return out


class Twin:
    """The same steps with dense matrices and no machinery."""

    def __init__(self, net: nn.Sequential, ema: float, decay: float, damping: float) -> None:
        self.net, self.ema, self.decay, self.damping = net, ema, decay, damping
        self.state: dict[int, dict[str, Any]] = {}

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        found = rows(self.net, x, y)
        self.net.zero_grad()
        nn.functional.cross_entropy(self.net(x), y).backward()
        for index, (inputs, outputs) in found.items():
            layer = self.net[index]
            now = self.state.setdefault(index, {"a": 0.0, "g": 0.0, "n": 0.0, "s": 0.0, "w": 0.0})
            now["a"] = self.ema * now["a"] + inputs.mT @ inputs
            now["g"] = self.ema * now["g"] + outputs.mT @ outputs
            now["n"] = self.ema * now["n"] + len(x)
            a, g = now["a"] / now["n"], now["g"] / now["n"]
            _, q_a = torch.linalg.eigh(a)
            _, q_g = torch.linalg.eigh(g)
            if "q_a" in now:
                turn_a, turn_g = (q_a.mT @ now["q_a"]).square(), (q_g.mT @ now["q_g"]).square()
                now["s"] = turn_g @ now["s"] @ turn_a.mT
            now["q_a"], now["q_g"] = q_a, q_g
            m = whole(layer, "grad")
            turned = q_g.mT @ m @ q_a
            now["s"] = self.decay * now["s"] + len(x) * turned.square()
            now["w"] = self.decay * now["w"] + 1
            shift = self.damping * a.diagonal().mean() * g.diagonal().mean()
            u = q_g @ (turned / (now["s"] / now["w"] + shift)) @ q_a.mT
            with torch.no_grad():
                layer.weight -= lr * u[:, : layer.in_features]
                if layer.bias is not None:
                    layer.bias -= lr * u[:, -1]


def test_steps_are_those_of_the_equations() -> None:
    mine, other = model(), model()
    engine, twin = made(mine, ema_decay=0.8, moment_decay=0.7), Twin(other, 0.8, 0.7, 0.1)
    for seed in range(8):
        step(engine, *data(seed))
        twin.step(*data(seed), lr=0.1)
    for index in (0, 2):
        gone = (whole(other[index]) - whole(model()[index])).norm()
        assert gone > 0.1
        assert (whole(mine[index]) - whole(other[index])).norm() < 1e-8 * gone


def along_eigenvectors() -> tuple[nn.Sequential, SingleEngine, Tensor, Tensor]:
    """Eigenvectors from a whole batch, then second moments from one loss term at a time, which all count alike."""
    net = model()
    x, y = data()
    engine = made(
        net,
        lr=1e-30,
        moment_decay=1 - 1e-9,
        factor_interval=[[0, 1], [1, None]],
        inverse_interval=[[0, 1], [1, None]],
    )
    step(engine, x, y)
    for moments in engine.optimizer.method.moments.values():
        moments.sum_OI.zero_()
        moments.weight.zero_()
    for index in range(N):
        step(engine, x[index : index + 1], y[index : index + 1])
    return net, engine, x, y


def blocks(engine: SingleEngine) -> dict[str, tuple[Tensor, Tensor]]:
    """Curvature of every layer, [O I, O I], by EKFAC and by K-FAC."""
    method = engine.optimizer.method
    out = {}
    for pair in method._pairs:
        q = torch.kron(pair.g.blocks[0].vectors_DD, pair.a.blocks[0].vectors_DD)
        s = method.moments[pair.layer.name].mean().reshape(-1)
        out[pair.layer.name] = (q * s) @ q.mT, torch.kron(pair.g.matrix(), pair.a.matrix())
    return out


def test_second_moments_of_single_terms_are_the_best_diagonal() -> None:
    """Of the exact Fisher in the eigenbasis: so no diagonal, K-FAC's among them, comes nearer to it."""
    net, engine, x, y = along_eigenvectors()
    for name, (ours, kfac) in blocks(engine).items():
        inputs, outputs = rows(net, x, y)[int(name)]
        each = torch.einsum("no,ni->noi", outputs, inputs).flatten(1)
        fisher = each.mT @ each / N
        pair = next(p for p in engine.optimizer.method._pairs if p.layer.name == name)
        q = torch.kron(pair.g.blocks[0].vectors_DD, pair.a.blocks[0].vectors_DD)
        best = (q * (q.mT @ fisher @ q).diagonal()) @ q.mT
        torch.testing.assert_close(ours, best, rtol=1e-7, atol=1e-9 * float(best.norm()))
        assert (fisher - ours).norm() < 0.99 * (fisher - kfac).norm()


def test_second_moments_of_single_terms_equal_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is a development extra")
    net, engine, x, y = along_eigenvectors()
    operator = curvlinops.EKFACLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        list(net.parameters()),
        [(x, y)],
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    size = sum(p.numel() for p in net.parameters())
    dense = operator @ torch.eye(size).double()
    start = 0
    for name, (ours, _) in blocks(engine).items():
        layer = net[int(name)]
        high, wide = layer.out_features, layer.in_features
        columns = wide + (layer.bias is not None)
        # curvlinops orders the weight, then the bias; ours has the bias as last column of every row.
        order = [row * columns + column for row in range(high) for column in range(wide)]
        order += [row * columns + wide for row in range(high) if layer.bias is not None]
        theirs = dense[start : start + len(order), start : start + len(order)]
        start += len(order)
        assert (ours[order][:, order] - theirs).abs().max() < 1e-7 * theirs.abs().max(), name
    assert start == size


def test_a_batch_adds_the_square_of_the_mean() -> None:
    """E[N M' o M'] = diagonal + (N - 1) mean^2, over all batches of N terms drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(2000, 6, generator=generator).double() + 0.5
    size = 8
    drawn = terms[torch.randint(2000, (40_000, size), generator=generator)].mean(1)
    found = size * drawn.square().mean(0)
    wanted = terms.square().mean(0) + (size - 1) * terms.mean(0).square()
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.0)


@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.floats(-10, 10), min_size=n, max_size=n)),
    st.floats(0.05, 5),
)
def test_neighbours_are_averaged_as_written(places: list[float], width: float) -> None:
    x_D = torch.tensor(sorted(places), dtype=torch.float64)
    s_RD = torch.rand(3, len(x_D), dtype=torch.float64, generator=torch.Generator().manual_seed(len(x_D)))
    kernel = torch.exp(-(x_D[:, None] - x_D[None]).abs() / width)
    wanted = (s_RD @ kernel) / kernel.sum(0)
    torch.testing.assert_close(neighbours_mean(s_RD, x_D, width), wanted, rtol=1e-6, atol=1e-12)
    assert neighbours_mean(s_RD, x_D, 0.0) is s_RD


def test_far_away_places_overflow_nothing() -> None:
    x_D = torch.tensor([0.0, 1e3, 2e3])
    s_RD = torch.tensor([[1.0, 1e30, 1e-30]])
    assert neighbours_mean(s_RD, x_D, 1e-3).isfinite().all()


def test_any_basis_of_equal_eigenvalues_gives_one_step() -> None:
    """Eigenvectors of an eigenvalue that comes thrice are anything; averaged, what belongs to them is not."""
    torch.manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(3, 3).double())
    found = []
    for smoothing in (0.0, 0.03):
        steps = []
        for basis in (torch.eye(3).double(), turn):
            block = EigenBlock(5, torch.zeros((), dtype=torch.float64), smoothing)
            block.values_D.copy_(torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0]))
            block.vectors_DD[:3, :3] = basis
            s_DR = torch.zeros(5, 2).double()
            for seed in range(4):
                m_DR = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed)).double()
                s_DR += block.turned(m_DR).square()
            steps.append(block.back(block.turned(m_DR) / (block.averaged(s_DR) + 0.1)))
        found.append(float((steps[0] - steps[1]).norm() / steps[0].norm()))
    assert found[0] > 0.05
    assert found[1] < 1e-12


def test_moments_follow_eigenvectors_that_change_places() -> None:
    block = EigenBlock(3, torch.zeros((), dtype=torch.float64), 0.0)
    s_DR = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).double()
    kept = s_DR.clone()
    block.carried.append(s_DR)
    order = [2, 0, 1]
    swapped = torch.eye(3).double()[:, order]
    yes = torch.tensor(True)
    block.keep([torch.ones(3).double(), ~yes, swapped, torch.ones(()).double()], yes)
    assert torch.equal(s_DR, kept[order])
    block.keep([torch.ones(3).double(), yes, torch.eye(3).double(), torch.ones(()).double()], ~yes)
    assert torch.equal(s_DR, kept[order])
    assert torch.equal(block.vectors_DD, swapped)


def test_a_failed_decomposition_keeps_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    engine = made(net)
    step(engine, *data(0))
    method = engine.optimizer.method
    before = {key: f.blocks[0].vectors_DD.clone() for key, f in method.factors.items()}

    def refused(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as broken:
        broken.setattr(torch.linalg, "eigh", refused)
        step(engine, *data(1))
        assert engine.health()["factor_failures"] == len(before)
        assert all(torch.equal(f.blocks[0].vectors_DD, before[key]) for key, f in method.factors.items())
    moved = whole(net[0]).clone()
    step(engine, *data(2))
    assert not torch.equal(whole(net[0]), moved)
    assert all(not torch.equal(f.blocks[0].vectors_DD, before[key]) for key, f in method.factors.items())


def test_roots_report_what_cannot_be_decomposed() -> None:
    assert roots.eigh(torch.full((3, 3), float("nan")))[2]


@pytest.mark.parametrize("key", ["low_rank", "apply", "storage"])
def test_forms_that_solve_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Config(**{key: 8})
    with pytest.raises(ValueError, match="Input should be 'empirical' or 'sampled'"):
        Config(fisher="forward_only")


def test_a_smoothing_that_is_too_fine_is_refused() -> None:
    assert Config(smoothing=0.0).smoothing == 0
    with pytest.raises(ValueError, match=r"0 or at least 0\.03"):
        Config(smoothing=0.01)
