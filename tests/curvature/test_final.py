"""A factor is complete when the last use of its layer in the last micro-batch has passed, neither earlier nor later."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsso.curvature.hooks import Capture
from dsso.curvature.layers import split_parameters
from dsso.curvature.sums import FactorSum

LIKE = torch.zeros(())


class Net(nn.Module):
    """Three blocks, the second one used twice, under one kind of checkpointing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for index in (0, 1, 1, 2):
            block = self.blocks[index]
            if self.kind == "none":
                x = torch.tanh(block(x))
            else:
                reentrant = self.kind == "reentrant"
                x = checkpoint(lambda t, b=block: torch.tanh(b(t)), x, use_reentrant=reentrant)
        return x


@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])
def test_the_order_of_the_backward_pass(kind: str) -> None:
    torch.manual_seed(0)
    model = Net(kind)
    layers = split_parameters(model).layers
    names = [layer.name for layer in layers]
    capture = Capture(model, layers, [f"{n}/a" for n in names], [f"{n}/g" for n in names])
    keys = [f"{n}/{side}" for n in names for side in "ag"]
    seen: list[str] = []
    snapshots: dict[str, Tensor] = {}

    def final(key: str) -> None:
        seen.append(key)
        snapshots[key] = capture.sums[key].parts[0].clone()

    capture.on_final = final
    capture.open({key: FactorSum((4,), (None,), LIKE) for key in keys}, 0)
    for micro in range(2):
        capture.last = micro == 1
        model(torch.randn(3, 4, requires_grad=True)).sum().backward()
        assert seen == [] or capture.last
    assert seen == [f"blocks.{i}/{side}" for i in (2, 1, 0) for side in "ag"]
    for key, sums in capture.sums.items():
        assert torch.equal(snapshots[key].triu(), sums.parts[0].triu()), key
    # Two micro-batches of three rows, the second block twice.
    assert [int(capture.sums[f"blocks.{i}/a"].count) for i in range(3)] == [6, 12, 6]
