"""Blocks of the Gauss-Newton matrix that small layers have formed, and the solves that they precondition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dsso.curvature.layer_blocks import root_column
from dsso.engines import estimates
from dsso.engines.single import SingleEngine
from dsso.errors import RecipeError, RunError
from dsso.optim.gauss_newton import Config, Method
from tests.optim.solves import CLASSES, COUNT, WIDE, data, dense, made, model, moved, step


def measured(engine: SingleEngine, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The blocks of a step, as they come out of the passes."""
    method = engine.optimizer.method
    assert isinstance(method, Method)
    blocks, found = method.layer_blocks, []
    assert blocks is not None
    own = blocks.take

    def take() -> list[Tensor]:
        blocks_of_step = own()
        found[:] = [one.clone() for one in blocks_of_step]
        return blocks_of_step

    monkeypatch.setattr(blocks, "take", take)
    step(engine, 0)
    return found


@pytest.mark.parametrize("gas", [1, 3])
def test_they_are_those_of_the_dense_matrix(gas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    _, matrix = dense(net, 0)
    engine = made(net, gas, block_parameters=25, damping=0.1, iterations=2)
    sizes = [(WIDE + 1) * 5, 6 * CLASSES]
    found = measured(engine, monkeypatch)
    assert [len(one) for one in found] == sizes
    at = 0
    for one, side in zip(found, sizes, strict=True):
        wanted = matrix[at : at + side, at : at + side]
        assert (one - wanted).norm() <= 1e-12 * wanted.norm()
        at += side


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("most", [25, 20])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_the_solution_is_the_same(kind: Any, most: int, gas: int) -> None:
    """Also where one of the two layers is too large for a block."""
    net = model()
    engine = made(
        net,
        gas,
        block_parameters=most,
        damping=0.02,
        damping_kind=kind,
        products="double_backward",
        iterations=90,
    )
    for seed in range(2):
        g, matrix = dense(net, seed)
        shift = 0.02 * ((g @ matrix @ g) / (g @ g) if kind == "relative" else 1.0)
        wanted = torch.linalg.solve(matrix + shift * torch.eye(len(g)).double(), g)
        u = moved(engine, lambda seed=seed: step(engine, seed))
        assert (u - wanted).norm() <= 1e-7 * wanted.norm()
        assert engine.health()["unusable_blocks"] == 0


def test_fewer_products_are_needed() -> None:
    """To a hundredth of the gradient, at a weak damping."""
    taken = {}
    for most in (None, 25):
        engine = made(
            model(),
            block_parameters=most,
            damping=1e-3,
            products="double_backward",
            tolerance=0.01,
            iterations=200,
        )
        step(engine, 0)
        taken[most] = engine.health()["cg_iterations"]
    assert taken[25] <= 0.7 * taken[None]


def test_a_block_that_is_the_whole_matrix_solves_at_once() -> None:
    """The first product goes along the gradient; the second is enough."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDE, CLASSES)).double()
    g, matrix = dense(net, 0)
    engine = made(net, block_parameters=100, damping=1e-2, products="double_backward", iterations=2)
    u = moved(engine, lambda: step(engine, 0))
    shift = 1e-2 * (g @ matrix @ g) / (g @ g)
    wanted = torch.linalg.solve(matrix + shift * torch.eye(len(g)).double(), g)
    assert (u - wanted).norm() <= 1e-8 * wanted.norm()


def test_only_small_layers_are_formed() -> None:
    engine = made(model(), block_parameters=6 * CLASSES)
    method = engine.optimizer.method
    assert isinstance(method, Method)
    assert method.layer_blocks is not None
    assert [one.name for one in method.layer_blocks.layers] == ["3"]
    with pytest.raises(
        RecipeError, match=r"(?s)block_parameters: no linear layer is small enough .* raise it"
    ):
        made(model(), block_parameters=5)
    with pytest.raises(RecipeError, match=r"no linear layer is small enough"):
        made(model(), block_parameters=6 * CLASSES, exclude=["^3$"])


def test_blocks_that_no_product_would_see_are_refused() -> None:
    with pytest.raises(ValidationError, match="block_parameters means nothing with iterations = 1"):
        Config(block_parameters=100, iterations=1)


def test_a_layer_that_is_used_twice_is_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDE, WIDE)
            self.last = nn.Linear(WIDE, CLASSES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Twice().double()
    _, matrix = dense(net, 0)
    found = measured(made(net, block_parameters=100, iterations=2), monkeypatch)
    side = WIDE * (WIDE + 1)
    assert (found[0] - matrix[:side, :side]).norm() <= 1e-12 * matrix.norm()


def test_a_root_column_by_column() -> None:
    torch.manual_seed(0)
    f = torch.randn(4, CLASSES).double()
    y = torch.randint(CLASSES, (4,))

    def loss(scores: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores, y, reduction="sum") / 7

    columns = torch.stack([root_column(loss, f, c) for c in range(CLASSES)], -1)
    p = f.softmax(-1)
    wanted = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / 7
    torch.testing.assert_close(columns @ columns.mT, wanted, rtol=1e-12, atol=1e-12)
    values = torch.randn(4).double()
    once = root_column(lambda s: (s - 1).square().sum() / 3, values, 0)
    torch.testing.assert_close(once, torch.full((4,), (2 / 3) ** 0.5).double())


def test_many_terms_an_example_are_refused() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(WIDE, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.view(-1, 2, WIDE))  # type: ignore[no-any-return]

    net = Tokens().double()
    engine = made(net, block_parameters=100)
    x, y = data(0)

    def loss(scores: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores, y, reduction="sum") / COUNT

    one = estimates.MicroBatch(COUNT, lambda: engine(x.view(-1, 2 * WIDE)).flatten(0, 1), loss, loss)
    with pytest.raises(RunError, match=r"(?s)params\.block_parameters: blocks need one loss .*12 terms of 6"):
        estimates.run(engine, lambda: [one])


def test_a_layer_without_one_row_an_example_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 2), nn.Linear(WIDE, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.view(-1, 2)).view(-1, WIDE))  # type: ignore[no-any-return]

    with pytest.raises(RunError, match=r"(?s)first: a layer's block cannot be formed.*24 rows of 12 exa"):
        step(made(Flat().double(), block_parameters=10), 0)


def test_a_block_that_cannot_be_factorized_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    engine = made(net, block_parameters=100, damping=0.3, products="double_backward")
    method = engine.optimizer.method
    assert isinstance(method, Method)
    assert method.layer_blocks is not None
    own = method.layer_blocks.take

    def spoilt() -> list[Tensor]:
        first, second = own()
        return [-first, second * float("nan")]

    monkeypatch.setattr(method.layer_blocks, "take", spoilt)
    g, matrix = dense(net, 0)
    shift = 0.3 * (g @ matrix @ g) / (g @ g)
    wanted = torch.linalg.solve(matrix + shift * torch.eye(len(g)).double(), g)
    u = moved(engine, lambda: step(engine, 0))
    assert engine.health()["unusable_blocks"] == 2
    assert (u - wanted).norm() <= 1e-8 * wanted.norm()


def test_hooks_are_taken_off() -> None:
    def hooks(net: nn.Module) -> int:
        return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in net.modules())

    net, plain = model(), model()
    made(plain)
    engine = made(net, block_parameters=100)
    assert hooks(net) == hooks(plain) + 3
    engine.optimizer.method.close()  # type: ignore[union-attr]
    assert hooks(net) == hooks(plain)
