"""Products with curvature against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dsso.curvature import products
from dsso.errors import RunError

N, WIDE, CLASSES = 7, 4, 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def losses(kind: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "cross_entropy":
        y = torch.randint(CLASSES, (N,), generator=generator)
        return lambda f: nn.functional.cross_entropy(f, y)
    target = torch.randn(N, CLASSES, generator=generator).double()
    return lambda f: (f - target).square().sum() / N


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def like(vector: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return [
        part.view(p.shape)
        for part, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)
    ]


def dense(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """J [N C, P], d2L/df2 [N C, N C] and the Hessian [P, P]."""
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach() for p in model.parameters()]

    def scores(vector: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, dict(zip(names, like(vector, parameters), strict=True)), (x,)
        )

    w = flat(parameters)
    j = torch.autograd.functional.jacobian(lambda v: scores(v).reshape(-1), w)
    f = scores(w)
    bent = torch.autograd.functional.hessian(lambda v: loss(v.view(f.shape)), f.reshape(-1))
    return j, bent, torch.autograd.functional.hessian(lambda v: loss(scores(v)), w)


@pytest.mark.parametrize("kind", ["cross_entropy", "squares"])
def test_exact_products(kind: str) -> None:
    model, loss = net(), losses(kind)
    x = torch.randn(N, WIDE, generator=torch.Generator().manual_seed(2)).double()
    j, bent, hessian = dense(model, loss, x)
    parameters = list(model.parameters())
    for seed in range(3):
        v = torch.randn(j.shape[1], generator=torch.Generator().manual_seed(seed)).double()
        f = model(x)
        t = products.pushforward(f, parameters, like(v, parameters))
        torch.testing.assert_close(t.reshape(-1), j @ v, rtol=1e-10, atol=1e-12)
        ht = products.loss_curvature(loss, f, t)
        torch.testing.assert_close(ht.reshape(-1), bent @ j @ v, rtol=1e-10, atol=1e-12)
        # The graph of the scores is still there.
        gv = flat(list(torch.autograd.grad((f * ht).sum(), parameters)))
        torch.testing.assert_close(gv, j.mT @ bent @ j @ v, rtol=1e-10, atol=1e-12)
        found = products.hessian_product(loss(model(x)), parameters, like(v, parameters))
        carried = products.with_gradient(parameters, found)
        hv = flat(list(torch.autograd.grad(carried, parameters)))
        torch.testing.assert_close(hv, hessian @ v, rtol=1e-10, atol=1e-12)


def test_sampled_curvature_has_the_exact_one_as_its_mean() -> None:
    model, loss = net(), losses("cross_entropy")
    x = torch.randn(N, WIDE, generator=torch.Generator().manual_seed(2)).double()
    f = model(x).detach()
    t = torch.randn(N, CLASSES, generator=torch.Generator().manual_seed(3)).double()
    mean, p = torch.zeros_like(t), f.softmax(-1)
    for label in range(CLASSES):
        # Every row draws this label with its own probability, and rows do not meet.
        y = torch.full((N,), label)
        one = products.sampled_curvature(lambda s, y=y: nn.functional.cross_entropy(s, y), N, f, t)
        mean += p[:, label : label + 1] * one
    torch.testing.assert_close(mean, products.loss_curvature(loss, f, t), rtol=1e-10, atol=1e-12)


def test_a_loss_without_curvature() -> None:
    f, t = torch.randn(N, CLASSES), torch.randn(N, CLASSES)
    assert not products.loss_curvature(lambda s: s.sum(), f, t).any()


def test_parameters_that_scores_do_not_depend_on() -> None:
    model, other = net(), nn.Linear(2, 2).double()
    x = torch.randn(N, WIDE).double()
    f = model(x)
    parameters = [*other.parameters(), *model.parameters()]
    v = [torch.randn_like(p) for p in parameters]
    torch.testing.assert_close(
        products.pushforward(f, parameters, v), products.pushforward(f, parameters[2:], v[2:])
    )
    assert not products.pushforward(f, parameters[:2], v[:2]).any()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(2, 5, 2, 4).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).sum((1, 2))


def test_fused_attention_is_refused_by_name() -> None:
    model = Attention()
    parameters = list(model.parameters())
    v = [torch.ones_like(p) for p in parameters]
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
        f = model(x)
        with pytest.raises(
            RunError, match=r"(?s)cannot be differentiated twice.*set products to 'difference'"
        ):
            products.hessian_product(f.square().sum(), parameters, v)
        with pytest.raises(RunError, match=r"cannot be differentiated twice"):
            products.pushforward(f, parameters, v)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        assert products.pushforward(model(x), parameters, v).isfinite().all()
