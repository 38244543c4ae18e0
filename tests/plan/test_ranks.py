"""Planned state and traffic of four and eight ranks against the method as each of them would build it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsso import tasks
from dsso.optim.kfac import Config, Method
from dsso.parallel.fragments import FragmentExchange, Span, SpanTable
from dsso.plan import resolve, text
from dsso.plan.kfac import KfacPlan
from dsso.plan.layout import layout
from dsso.plan.model import Survey, survey
from dsso.recipe import ResolvedRecipe, load_recipe
from tests.plan.cases import ADAPTER, BLOCKS, LORA, LOW, forward, on_meta, planned, recipe

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "low_rank": LOW,
    "blocks": BLOCKS,
    "narrow": {"storage": "bfloat16"},
    "forward_only": {"fisher": "forward_only"},
    "hybrid": {"strategy": "hybrid_optimal"},
    "everywhere": {"strategy": "communication_optimal"},
}


@pytest.mark.parametrize("world_size", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_state_bytes(kind: str, world_size: int) -> None:
    raw = recipe("zero-2", model="tiny-t5", params=KINDS[kind])
    written = load_recipe(raw)
    task = tasks.load_task(written.dsso.task, 0)
    model = tasks.models.load(written.dsso.model, task, written.dsso.task).model
    found = planned(raw, world_size)
    for rank in range(world_size):
        method = Method(written.optimizer_config, model, torch.device("cpu"), rank, world_size)  # type: ignore[arg-type]
        assert found.ranks[rank].factors == method.state_bytes()
        wire = 4 * sum(method.placement.wire_elements(r) for r in range(world_size))
        assert found.wire.statistics == wire
        method.close()


def spans(seen: Survey, resolved: ResolvedRecipe, engine: str, rank: int) -> list[Span]:
    """This rank's pieces, as its engine would lay them out."""
    world, held = resolved.world_size, layout(seen, resolved, engine, rank).held
    before = [layout(seen, resolved, engine, r).held for r in range(rank)]
    out, at = [], 0
    for weight in seen.trained:
        numel = held.get(weight.name, 0)
        replica = engine == "ddp"
        start = 0 if replica else sum(one.get(weight.name, 0) for one in before)
        if numel:
            out.append(Span(weight.name, start, numel, 0, at))
            at += numel
    assert world > rank
    return out


@pytest.mark.parametrize("strategy", ["memory_optimal", "hybrid_optimal", "communication_optimal"])
@pytest.mark.parametrize("engine", ["zero-2", "zero-3", "fsdp2", "ddp"])
@pytest.mark.parametrize("peft", [LORA, ADAPTER, {"type": "none"}], ids=["lora", "adapter", "full"])
def test_exchange(engine: str, strategy: str, peft: dict[str, Any]) -> None:
    world = 4
    written = load_recipe(recipe(engine, model="tiny-bert", peft=peft, params={"strategy": strategy}))
    config = written.optimizer_config
    assert isinstance(config, Config)
    resolved = resolve(written, world)
    seen = survey(on_meta(written), config)
    method = KfacPlan(seen, config, world, resolved.gas)
    pieces = [spans(seen, resolved, engine, rank) for rank in range(world)]
    table = SpanTable({w.name: w.numel for w in seen.trained}, tuple(map(tuple, pieces)))
    table.check()
    workers = {n: method.placement.appliers[layer.name] for layer in seen.layers for n in layer.parameters}
    found = method.exchange([layout(seen, resolved, engine, rank).held for rank in range(world)])
    for rank in range(world):
        real = FragmentExchange(table, workers, rank)
        rows = [row for table_ in (real._sent, real._answered) for r, row in enumerate(table_) if r != rank]
        assert found[rank].sent == 4 * sum(copy.numel for row in rows for copy in row)
        assert found[rank].owned == 4 * sum(real.sizes[name] for name in real.owned)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_sends_on_average(kind: str) -> None:
    """By the recipe's intervals: everything of a step, and a half of a measurement and of a factorization."""
    wire = planned(recipe("zero-2", model="tiny-t5", params=KINDS[kind]), 4).wire
    seldom = wire.statistics + wire.bases + wire.factorizations
    assert wire.gradients > 0
    assert wire.exchange > 0
    assert wire.statistics > 0
    assert wire.per_step == int(wire.gradients + wire.weights + wire.exchange + seldom / 2)
    assert wire.losses == 0


@pytest.mark.parametrize("world_size", [1, 4])
def test_offloaded_weights_are_not_counted_on_the_device(world_size: int) -> None:
    raw = forward("MeZO", recipe("zero-3", "bf16"))
    here = planned(raw, world_size)
    raw["zero_optimization"]["offload_param"] = {"device": "cpu"}
    there = planned(raw, world_size)
    for rank, off in zip(here.ranks, there.ranks, strict=True):
        assert off.host + off.weights == rank.weights + rank.masters + rank.moments
        assert (off.masters, off.moments, rank.host) == (0, 0, 0)
        assert off.peak == off.weights + off.buckets
        assert off.buckets > 0
    assert "on the host" in text(there)
    assert "on the host" not in text(here)


def test_what_a_step_from_forward_passes_sends() -> None:
    """Two losses and two counts, eight bytes each; weights where they are sharded, once a pass."""
    replicas = planned(forward("MeZO", recipe("ddp")), 4).wire
    assert (replicas.losses, replicas.weights, replicas.per_step) == (32, 0, 32)
    sharded = planned(forward("MeZO", recipe("fsdp2", "bf16"), sides=1, directions=3), 4)
    assert sharded.wire.losses == 64
    assert sharded.wire.weights == 2 * sharded.parameters * 4
    assert sharded.wire.per_step == sharded.wire.losses + sharded.wire.weights
