"""K-FAC against exact curvature where it must be exact, and against curvlinops elsewhere, in float64."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim.kfac import Config

CPU = torch.device("cpu")


def _engine(model: nn.Module, **settings: Any) -> SingleEngine:
    defaults = {"lr": 1.0, "momentum": 0.0, "clip": "none", "damping": 1e-3, "damping_mode": "absolute_each"}
    config = Config(**{**defaults, **settings})
    return SingleEngine(model, make_optimizer(model, "KFAC", config, CPU), CPU, 1, 1)


def _factors(engine: SingleEngine) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Averages A and G of every layer."""
    method = engine.optimizer.method
    return {
        layer.name: (method.factors[layer.a.key].matrix(), layer.g and method.factors[layer.g.key].matrix())
        for layer in method.placement.layers
    }


def _with_bias(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], 1) if layer.bias is not None else layer.weight


def _gradient(layer: nn.Linear) -> Tensor:
    if layer.bias is None:
        return layer.weight.grad.clone()
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)


@pytest.mark.parametrize("bias", [True, False])
def test_one_datum_is_the_exact_empirical_fisher_step(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).double()
    x, y = torch.randn(1, 4).double(), torch.tensor([2])
    damping = 0.3
    engine = _engine(model, damping=damping)
    before = {i: _with_bias(model[i]).detach().clone() for i in (0, 2)}
    nn.functional.cross_entropy(model(x), y).backward()
    wanted = {}
    for i in (0, 2):
        gradient = _gradient(model[i])
        # With one datum and one row the block is vec(M) vec(M)^T = A (x) G exactly; damp both factors densely.
        a, g = _outer_factors(model, i, x, y)
        assert torch.allclose(torch.kron(g, a), torch.outer(gradient.reshape(-1), gradient.reshape(-1)))
        dense = torch.kron(g + damping * torch.eye(len(g)), a + damping * torch.eye(len(a)))
        wanted[i] = before[i] - torch.linalg.solve(dense, gradient.reshape(-1)).view_as(gradient)
    model.zero_grad()
    engine.train()
    engine.backward(nn.functional.cross_entropy(engine(x), y), terms=1)
    engine.step()
    for i in (0, 2):
        error = (_with_bias(model[i]) - wanted[i]).abs().max() / wanted[i].abs().max()
        assert error < 1e-6


def _outer_factors(model: nn.Sequential, index: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model[:index](x).detach()
    out = model[index](hidden).detach().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model[index + 1 :](out), y), out)
    a = torch.cat([hidden, torch.ones(1, 1).double()], 1) if model[index].bias is not None else hidden
    return a.mT @ a, g.mT @ g


@pytest.mark.parametrize("tokens", [1, 3])
def test_deep_linear_network_has_the_exact_ggn(tokens: int) -> None:
    """With squared error and no non-linearity, G does not depend on the input, so A (x) G is the GGN block."""
    model = _deep_linear()
    x = torch.randn(6, tokens, 3).double()
    engine = _engine(model, fisher="sampled")
    engine.train()
    terms = 6 * tokens
    engine.backward((engine(x) ** 2).sum() / terms, terms=terms)
    # Labels f - e_k / sqrt(2), one pass for each output k: the passes sum up to the loss's Hessian, 2 I.
    for k in range(2):

        def forward(k: int = k) -> Tensor:
            out = engine(x)
            label = out.detach().clone()
            label[..., k] -= 0.5**0.5
            return ((out - label) ** 2).sum() / terms

        engine.sampled_pass(forward)
    engine.step()
    fresh = _deep_linear()
    for name, (a, g) in _factors(engine).items():
        dense = _dense_ggn(fresh, int(name), x)
        assert g is not None
        error = (torch.kron(g, a) - dense).abs().max() / dense.abs().max()
        assert error < 1e-6, name


def _deep_linear() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)).double()


def _dense_ggn(model: nn.Sequential, index: int, x: Tensor) -> Tensor:
    """1/N sum_n J_n^T 2 I J_n for the parameters of one layer, a bias as last column."""
    rows = x.reshape(-1, x.shape[-1])
    layer = model[index]

    def outputs(w: Tensor, row: Tensor) -> Tensor:
        h = model[:index](row)
        h = torch.cat([h, torch.ones(1).double()]) if layer.bias is not None else h
        return model[index + 1 :](w @ h)

    total = 0
    for row in rows:
        j = torch.autograd.functional.jacobian(
            functools.partial(outputs, row=row), _with_bias(layer).detach()
        )
        j = j.reshape(j.shape[0], -1)
        total = total + 2 * j.mT @ j
    return total / len(rows)


class _Attention(nn.Module):
    """Linear layers shared over tokens, mixed over tokens, and pooled to one score a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        h = torch.softmax(h @ self.mix(h).mT, -1) @ h
        return self.down(h.mean(1))


@pytest.mark.parametrize("fisher", ["empirical", "forward_only"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_equal_curvlinops(fisher: str, approximation: str) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is a development extra")
    torch.manual_seed(2)
    model = _Attention().double()
    x, y = torch.randn(5, 7, 4).double(), torch.randint(3, (5,))
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        parameters,
        [(x, y)],
        fisher_type=fisher.replace("_", "-"),
        kfac_approx=approximation,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    size = sum(p.numel() for p in parameters)
    dense = operator @ torch.eye(size).double()
    engine = _engine(model, fisher=fisher, approximation=approximation)
    engine.train()
    engine.backward(nn.functional.cross_entropy(engine(x), y), terms=5)
    engine.step()
    start = 0
    for name, layer in (("up", model.up), ("mix", model.mix), ("down", model.down)):
        a, g = _factors(engine)[name]
        g = torch.eye(layer.out_features).double() if g is None else g
        width, height = layer.in_features, layer.out_features
        block = torch.kron(g, a)
        # curvlinops orders the weight, then the bias; ours has the bias as last column of every row.
        weight = [row * a.shape[0] + column for row in range(height) for column in range(width)]
        bias = [row * a.shape[0] + width for row in range(height)] if layer.bias is not None else []
        order = torch.tensor(weight + bias)
        mine = block[order][:, order]
        theirs = dense[start : start + len(order), start : start + len(order)]
        start += len(order)
        assert (mine - theirs).abs().max() / theirs.abs().max() < 1e-6, name
    assert start == size


def test_padding_does_not_enter_the_factors() -> None:
    """A padded batch gives the factors of the same sequences without padding."""
    torch.manual_seed(3)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            h = torch.tanh(self.one(x))
            m = attention_mask.to(h.dtype).unsqueeze(-1)
            return self.two((h * m).sum(1) / m.sum(1))

    for approximation in ("expand", "reduce"):
        torch.manual_seed(4)
        model = Masked().double()
        lengths = [2, 5, 3]
        rows = [torch.randn(1, n, 4).double() for n in lengths]
        y = torch.tensor([0, 1, 1])
        padded = torch.full((3, 6, 4), 9.0).double()
        mask = torch.zeros(3, 6, dtype=torch.long)
        for i, row in enumerate(rows):
            padded[i, : lengths[i]] = row[0]
            mask[i, : lengths[i]] = 1
        found = []
        for batches in (
            [(padded, mask, y)],
            [(r, torch.ones(1, r.shape[1]).long(), y[i : i + 1]) for i, r in enumerate(rows)],
        ):
            engine = SingleEngine(
                twin := copy.deepcopy(model),
                make_optimizer(twin, "KFAC", Config(clip="none", approximation=approximation), CPU),
                CPU,
                len(batches),
                1,
            )
            engine.train()
            for x, m, label in batches:
                terms = 3 / len(batches)
                loss = (
                    nn.functional.cross_entropy(engine(x=x, attention_mask=m), label, reduction="sum") / terms
                )
                engine.backward(loss, terms=terms)
                engine.step()
            found.append(_factors(engine))
        for name, (a, g) in found[0].items():
            torch.testing.assert_close(a, found[1][name][0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(g, found[1][name][1], rtol=1e-10, atol=1e-12)
