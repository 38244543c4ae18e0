"""Gauss-Newton steps against dense solves in float64, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import estimates, make_optimizer
from dsso.engines.single import SingleEngine
from dsso.errors import RecipeError, RunError
from dsso.optim.gauss_newton import Config
from dsso.recipe import load_recipe
from tests.optim.solves import COUNT, CPU, data, dense, made, model, moved, step
from tests.plan.cases import other, recipe


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("curvature", ["exact", "sampled"])
@pytest.mark.parametrize(("products", "close"), [("double_backward", 1e-8), ("difference", 1e-5)])
def test_steps_are_those_of_dense_solves(products: str, close: float, curvature: str, gas: int) -> None:
    net = model()
    engine = made(net, gas, products=products, curvature=curvature, damping=0.3)
    for seed in range(3):
        g, matrix = dense(net, seed, curvature == "sampled")
        shift = 0.3 * (g @ matrix @ g) / (g @ g)
        wanted = torch.linalg.solve(matrix + shift * torch.eye(len(g)).double(), g)
        u = moved(engine, lambda seed=seed: step(engine, seed))
        assert (u - wanted).norm() <= close * wanted.norm()
        health = engine.health()
        assert health["damping"] == pytest.approx(float(shift), rel=1e-4)
        assert health["cg_residual"] < 1e-6
        assert 0 < health["cos_update_grad"] < 0.99
    assert engine.global_steps == 3


def test_the_solve_ends_at_the_tolerance() -> None:
    short, long = made(model(), tolerance=0.3), made(model(), tolerance=0.0)
    windows = [0, 0]
    for index, engine in enumerate((short, long)):
        own = engine.estimating

        def counted(index: int = index, own: Any = own) -> Any:
            windows[index] += 1
            return own()

        engine.estimating = counted  # type: ignore[method-assign]
        step(engine, 0)
    # The gradient, the products, and one more because a residual is known one product late.
    assert windows[1] == 61
    assert windows[0] == short.health()["cg_iterations"] + 2
    assert short.health()["cg_residual"] <= 0.3 < 1


def test_few_iterations_go_further_along_the_gradient_than_none() -> None:
    net = model()
    g, matrix = dense(net, 0)
    engine = made(net, iterations=1, damping=0.1)
    u = moved(engine, lambda: step(engine, 0))
    curvature = (g @ matrix @ g) / (g @ g)
    torch.testing.assert_close(u, g / (1.1 * curvature), rtol=1e-5, atol=1e-10)


def test_absolute_damping() -> None:
    net = model()
    g, matrix = dense(net, 0)
    engine = made(net, damping=0.02, damping_kind="absolute", products="double_backward")
    u = moved(engine, lambda: step(engine, 0))
    wanted = torch.linalg.solve(matrix + 0.02 * torch.eye(len(g)).double(), g)
    torch.testing.assert_close(u, wanted, rtol=1e-7, atol=1e-9)


def test_all_windows_leave_out_the_same() -> None:
    """With dropout the solve is one of the network that the gradient is of."""
    net, twin = model(0.5), model(0.5)
    engine = made(net, damping=0.3, products="double_backward")
    torch.manual_seed(5)
    u = moved(engine, lambda: step(engine, 0))
    x, _ = data(0)
    torch.manual_seed(5)
    kept = nn.functional.dropout(torch.ones(COUNT, 5).double(), 0.5)
    parameters = list(twin.parameters())
    total, matrix = torch.zeros(len(u)).double(), torch.zeros(len(u), len(u)).double()
    for row, label, mask in zip(x, data(0)[1], kept, strict=True):
        f = twin[3](torch.tanh(twin[0](row)) * mask)
        js = [torch.autograd.grad(z, parameters, retain_graph=True) for z in f]
        j = torch.stack([torch.cat([g.flatten() for g in one]) for one in js])
        p = f.detach().softmax(-1)
        matrix += j.mT @ (torch.diag(p) - torch.outer(p, p)) @ j / COUNT
        grads = torch.autograd.grad(nn.functional.cross_entropy(f, label), parameters)
        total += torch.cat([g.flatten() for g in grads]) / COUNT
    shift = 0.3 * (total @ matrix @ total) / (total @ total)
    wanted = torch.linalg.solve(matrix + shift * torch.eye(len(u)).double(), total)
    torch.testing.assert_close(u, wanted, rtol=1e-6, atol=1e-8)


def test_first_order_steps_make_no_products() -> None:
    engine = made(model(), warmup_steps=2, warmup_scale=0.1)
    assert engine.wants_estimate() is None
    step(engine, 0)
    assert engine.health()["cos_update_grad"] == pytest.approx(1.0)
    step(engine, 1)
    assert engine.wants_estimate() == "gradient"


def test_weights_are_exactly_what_they_were() -> None:
    net = model().float()
    engine = SingleEngine(net, make_optimizer(net, "GAUSS_NEWTON", Config(iterations=3), CPU), CPU, 1, COUNT)
    engine.train()
    x, y = data(0)
    before = [p.detach().clone() for p in net.parameters()]
    one = estimates.MicroBatch(
        COUNT, lambda: engine(x.float()), lambda s: nn.functional.cross_entropy(s, y), lambda s: s.sum() * 0
    )
    estimates.run(engine, lambda: [one])
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    assert engine.wants_estimate() is None


def test_a_loop_without_windows_is_told() -> None:
    engine = made(model())
    x, y = data(0)
    engine.backward(nn.functional.cross_entropy(engine(x), y), terms=COUNT)
    with pytest.raises(RunError, match=r"engine\.step: step 0 needs an estimate"):
        engine.step()


@pytest.mark.parametrize(
    ("base", "given", "words"),
    [
        (recipe("zero-3"), {"products": "double_backward"}, r"ZeRO stage 3 has no whole weights"),
        (recipe("fsdp2"), {"products": "double_backward"}, r"FSDP2 has no whole weights"),
        (recipe("zero-2", "bf16"), {}, r"lost in the rounding of bfloat16"),
        (
            recipe("zero-2", fp16={"enabled": True}),
            {"products": "double_backward"},
            r"a loss scale may change",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(base: dict[str, Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(other("GAUSS_NEWTON", base, **given))
    with pytest.raises(RecipeError, match=words):
        load_recipe(other("SOPHIA", base, estimator="hutchinson", **given))
    load_recipe(other("SOPHIA", base))


def test_settings_of_products_without_products_are_refused() -> None:
    with pytest.raises(RecipeError, match="probe_seed means nothing without estimator = hutchinson"):
        load_recipe(other("SOPHIA", recipe("zero-2"), probe_seed=3))


@pytest.mark.parametrize("kind", ["SOPHIA", "GAUSS_NEWTON"])
def test_nothing_left_to_work_on_is_refused(kind: str) -> None:
    config: Any = __import__(f"dsso.optim.{kind.lower()}", fromlist=["Config"]).Config(exclude=["."])
    with pytest.raises(RecipeError, match=r"optimizer\.params\.exclude: .* has no parameter to work on"):
        make_optimizer(model(), kind, config, CPU)


class Straight(torch.autograd.Function):
    """An operation whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Once(nn.Module):
    """A layer with that operation in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(self.inner(x))  # type: ignore[no-any-return]


def test_a_model_that_cannot_be_differentiated_twice_is_told_at_the_first_step() -> None:
    engine = made(Once(), products="double_backward", warmup_steps=10)
    with pytest.raises(RunError, match=r"(?s)cannot be differentiated twice.*set products to 'difference'"):
        step(engine, 0)
    assert engine.global_steps == 0
    step(made(Once(), products="difference", warmup_steps=10), 0)
    step(made(Once(), products="difference"), 0)
