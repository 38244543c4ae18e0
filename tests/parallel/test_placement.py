"""Placement as tables, without processes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.parallel.placement import FactorDims, LayerDims, Placement, assign, slots


def _layer(name: str, a: int, g: int, leader: str | None = None) -> LayerDims:
    return LayerDims(
        name, FactorDims(f"{leader or name}/a", (a,)), FactorDims(f"{name}/g", (g,)) if g else None
    )


layers = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=40).map(
    lambda dims: [_layer(f"layer{i}", a, g) for i, (a, g) in enumerate(dims)]
)
STRATEGIES = ["memory_optimal", "communication_optimal", "hybrid_optimal"]


@settings(max_examples=60, deadline=None)
@given(layers=layers, world=st.integers(1, 9))
def test_every_factor_is_kept_once_and_memory_is_an_even_share_and_a_unit(
    layers: list[LayerDims], world: int
) -> None:
    plan = assign(layers, world)
    assert list(plan.owner) == [layer.name for layer in layers]
    assert sum(len(plan.owned_by(rank)) for rank in range(world)) == len(layers)
    assert all(len(ranks) == 1 for ranks in plan.factor_owners.values())
    total = sum(f.elements for f in plan.factors.values())
    largest = max(unit.elements for unit in plan.units)
    held = [plan.factor_bytes(rank, 1) for rank in range(world)]
    assert sum(held) == total
    assert max(held) <= total / world + largest


def test_equal_layers_are_spread_evenly() -> None:
    plan = assign([_layer(f"l{i}", 64, 8) for i in range(16)], 8)
    assert [len(plan.owned_by(rank)) for rank in range(8)] == [2] * 8
    assert len({plan.factor_bytes(rank) for rank in range(8)}) == 1
    assert len(set(plan.costs)) == 1


def test_dearest_layers_go_apart_and_the_plan_is_deterministic() -> None:
    layers = [_layer("small", 8, 8), _layer("big1", 512, 512), _layer("big2", 512, 512)]
    plan = assign(layers, 2)
    assert plan.owner["big1"] != plan.owner["big2"]
    assert plan.owner == assign(list(layers), 2).owner
    assert list(plan.owner) == ["small", "big1", "big2"]


def test_layers_with_a_common_input_stay_together_and_keep_it_once() -> None:
    layers = [_layer(f"{b}.{n}", 64, 8, f"{b}.q") for b in range(4) for n in "qkv"]
    plan = assign(layers, 4)
    for block in range(4):
        assert len({plan.owner[f"{block}.{n}"] for n in "qkv"}) == 1
    assert len([key for key in plan.factors if key.endswith("/a")]) == 4
    assert all(len(ranks) == 1 for ranks in plan.factor_owners.values())


def test_a_unit_that_is_too_large_is_cut_and_each_part_keeps_the_common_input() -> None:
    """As in an encoder-decoder, where all cross-attentions read the encoder's output."""
    layers = [_layer(f"l{i}", 32, 64, "l0") for i in range(12)]
    plan = assign(layers, 4)
    assert sorted(len(plan.owned_by(rank)) for rank in range(4)) == [3, 3, 3, 3]
    assert len(plan.factor_owners["l0/a"]) == 4
    assert all(len(plan.factor_owners[f"l{i}/g"]) == 1 for i in range(12))


@settings(max_examples=60, deadline=None)
@given(
    layers=layers,
    world=st.integers(1, 9),
    strategy=st.sampled_from(STRATEGIES),
    fraction=st.floats(0.01, 1.0),
)
def test_appliers_have_what_they_need(
    layers: list[LayerDims], world: int, strategy: str, fraction: float
) -> None:
    plan = assign(layers, world, strategy, fraction)
    wanted = {"memory_optimal": 1, "communication_optimal": world}.get(
        strategy, max(1, round(fraction * world))
    )
    for layer in layers:
        ranks = plan.appliers[layer.name]
        assert len(set(ranks)) == len(ranks) == wanted
        for factor in layer.factors:
            for rank in ranks:
                source = plan.sources[factor.key][rank]
                assert source in plan.factor_owners[factor.key]
            assert plan.sources[factor.key][ranks[0]] == ranks[0]
    for rank in range(world):
        keys = {f.key for layer in layers if rank in plan.appliers[layer.name] for f in layer.factors}
        assert keys == {f.key for f in plan.held_by(rank)}


def test_blocks_and_low_rank_forms_are_counted() -> None:
    dense, cut = FactorDims("d", (4096,)), FactorDims("c", (1024,) * 4)
    low = FactorDims("l", (4096,), 64)
    assert dense.elements == 4096 * 4097
    assert cut.elements == 4 * 1024 * 1025
    assert cut.wire_elements == 4 * 1024 * 1025 // 2
    assert cut.refresh_cost == pytest.approx(dense.refresh_cost / 16)
    assert low.wire_elements == 4096 * 64 + 1
    assert low.elements < dense.elements / 25
    assert FactorDims("s", (32,), 64).elements == 32 * 33  # a small block stays dense


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.floats(1, 1e6), min_size=1, max_size=60), count=st.integers(1, 20))
def test_slots_are_level(costs: list[float], count: int) -> None:
    found = slots(costs, count)
    load = [sum(c for c, slot in zip(costs, found, strict=True) if slot == s) for s in range(count)]
    assert max(load) <= sum(costs) / count + max(costs)
    assert all(0 <= slot < count for slot in found)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="world_size"):
        assign([], 0)
    with pytest.raises(ValueError, match="unique"):
        assign([_layer("a", 1, 1), _layer("a", 2, 2)], 1)
    with pytest.raises(ValueError, match="two descriptions"):
        assign([_layer("a", 1, 1), _layer("b", 2, 2, "a")], 1)


def test_no_layers_is_an_empty_plan() -> None:
    plan = assign([], 3)
    assert isinstance(plan, Placement)
    assert plan.costs == [0.0, 0.0, 0.0]
