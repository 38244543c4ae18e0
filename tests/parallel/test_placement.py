"""Placement as tables, without processes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.parallel.placement import LayerDims, assign

layers = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=40).map(
    lambda dims: [LayerDims(f"layer{i}", a, g) for i, (a, g) in enumerate(dims)]
)


@settings(max_examples=60, deadline=None)
@given(layers=layers, world=st.integers(1, 9))
def test_every_layer_has_one_owner_and_loads_meet_the_bound(layers: list[LayerDims], world: int) -> None:
    plan = assign(layers, world)
    assert set(plan.owner) == {layer.name for layer in layers}
    assert sum(len(plan.owned_by(rank)) for rank in range(world)) == len(layers)
    # List scheduling never leaves a rank above the mean by more than one job (Graham's bound).
    mean = sum(layer.cost for layer in layers) / world
    assert max(plan.costs) <= mean + max(layer.cost for layer in layers) * (1 - 1 / world) + 1e-6
    total = sum(plan.factor_bytes(rank) for rank in range(world))
    assert total == sum(2 * 4 * (layer.inputs**2 + layer.outputs**2) for layer in layers)


def test_equal_layers_are_spread_evenly() -> None:
    plan = assign([LayerDims(f"l{i}", 64, 8) for i in range(16)], 8)
    assert [len(plan.owned_by(rank)) for rank in range(8)] == [2] * 8
    assert len({plan.factor_bytes(rank) for rank in range(8)}) == 1


def test_dearest_layers_go_apart_and_the_plan_is_deterministic() -> None:
    layers = [LayerDims("small", 8, 8), LayerDims("big1", 512, 512), LayerDims("big2", 512, 512)]
    plan = assign(layers, 2)
    assert plan.owner["big1"] != plan.owner["big2"]
    assert plan.owner == assign(list(layers), 2).owner
    assert list(plan.owner) == ["small", "big1", "big2"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="world_size"):
        assign([], 0)
    with pytest.raises(ValueError, match="unique"):
        assign([LayerDims("a", 1, 1), LayerDims("a", 2, 2)], 1)
