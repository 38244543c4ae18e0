"""Blocks that are stacked do what each does by itself; products by halves and panels are those of whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.linalg import triangle
from dsso.optim import _matrix, available, is_forward, resolve
from dsso.optim._matrix import MatrixMethod
from dsso.optim._unfold import add_gram, along, along_upper, norms, rms, upper_gram
from tests.conformance.methods import made, settings

STACKING = [
    name for name in available() if not is_forward(name) and issubclass(resolve(name).Method, MatrixMethod)
]


class Alike(nn.Module):
    """Layers of the same sides, of which one is not reached at first and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(4))
        self.late, self.never = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)

    def forward(self, x: Tensor, late: bool) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.late(x) if late else x


def run(kind: str, **given: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Alike().double()
    engine = made(kind, model, **given)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(8, 5, generator=generator).double() for _ in range(2))
        engine.backward(nn.functional.mse_loss(engine(x, late=seed > 2), y), terms=8)
        engine.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, {name: t.clone() for name, t in engine.optimizer.method.state_tensors().items()}


@pytest.mark.parametrize(
    "options", [{}, {"stagger": False, "sides": "all", "momentum": 0.5}], ids=["plain", "else"]
)
@pytest.mark.parametrize("kind", STACKING)
def test_a_stack_does_what_blocks_do(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = [len(blocks) for blocks, _ in made(kind, Alike(), **options).optimizer.method._stacks]
    assert sizes == [6]
    stacked = run(kind, **options)
    monkeypatch.setattr(_matrix, "STACKED", 1)
    sizes = [len(blocks) for blocks, _ in made(kind, Alike(), **options).optimizer.method._stacks]
    assert sizes == [1] * 6
    single = run(kind, **options)
    for one, two in zip(stacked, single, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-9, atol=1e-9)
    start = Alike().state_dict()
    assert not torch.equal(stacked[0]["late.weight"], start["late.weight"])


def test_a_stack_is_not_larger_than_is_worth_a_copy() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1024, 300, bias=False, device="meta") for _ in range(5))

    model = Wide().to_empty(device="cpu")
    module = resolve("SOAP")
    method = module.Method(module.Config(**settings(module)), model, torch.device("cpu"), 0, 1)
    assert [len(blocks) for blocks, _ in method._stacks] == [3, 2]


@pytest.mark.parametrize("sides", [(7, 4), (4, 7), (3, 7, 2), (7, 3, 5)])
@pytest.mark.parametrize("panel", [2, 3, 256])
def test_products_along_a_side(sides: tuple[int, ...], panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "PANEL", panel)
    torch.manual_seed(0)
    x = torch.randn(3, *sides).double()
    for dim, side in enumerate(sides):
        matrices = torch.randn(3, side, side).double()
        upper = matrices.triu()
        sums = torch.randn(3, side, side).double()
        grams = sums.clone()
        add_gram(grams, x, dim, torch.tensor(0.7).double(), 0.2)
        for k in range(3):
            flat = x[k].movedim(dim, 0).reshape(side, -1)
            wanted = 0.7 * sums[k] + 0.2 * flat @ flat.mT
            torch.testing.assert_close(grams[k].tril(), wanted.tril())
            torch.testing.assert_close(upper_gram(flat).triu(), (flat @ flat.mT).triu())
            for found, matrix in (
                (along(matrices, x, dim), matrices[k]),
                (along_upper(upper, x, dim), upper[k]),
                (along_upper(upper, x, dim, transposed=True), upper[k].mT),
            ):
                product = torch.tensordot(matrix, x[k], ([1], [dim])).movedim(0, dim)
                torch.testing.assert_close(found[k], product)
    torch.testing.assert_close(norms(x).flatten(), torch.stack([one.norm() for one in x]))
    torch.testing.assert_close(rms(x).flatten(), torch.stack([one.square().mean().sqrt() for one in x]))
