"""One rank of real runs whose tensors are counted: `counted.py CASES OUT`; every rank writes a JSON line a case."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsso import engines, tasks
from dsso.curvature.sums import FactorSum
from dsso.engines import estimates
from dsso.engines.base import EngineBase
from dsso.engines.forward import ForwardEngine
from dsso.parallel import collectives
from dsso.recipe import load_recipe

# Seconds between two looks at the tensors that are alive.
SETTLE = 0.1


def _plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Local parts, and what hides in them: ZeRO-3's slices, the padding of FSDP2's shards."""
    out: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            with torch.no_grad():
                out.append(tensor.to_local())
        else:
            out.append(tensor)
        hidden = getattr(tensor, "ds_tensor", None)
        if hidden is not None:
            out.append(hidden)
    return out


def storages(tensors: Iterable[Tensor], integers: bool = True) -> dict[int, int]:
    """Bytes of the memory behind tensors, every piece once."""
    found = {}
    for tensor in _plain(tensors):
        storage = tensor.untyped_storage()
        if storage.nbytes() and (integers or tensor.is_floating_point()):
            found[storage.data_ptr()] = storage.nbytes()
    return found


def alive() -> dict[int, int]:
    """The memory of every tensor that Python can reach, but for batches, which are integers.

    A thread of gloo may hold what it has just sent for some milliseconds after the collective returned, and with
    it the Python object: looked at again until nothing goes away any more.
    """
    found = _reachable()
    while collectives.world_size() > 1:
        time.sleep(SETTLE)
        again = _reachable()
        if again.keys() >= found.keys():
            break
        found = again
    return found


def _reachable() -> dict[int, int]:
    gc.collect()
    found: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in gc.get_objects():
            try:
                if (
                    isinstance(one, Tensor)
                    and one.device.type == "cpu"
                    and type(one).__name__ != "FakeTensor"
                ):
                    found.append(one)
                    if one.is_leaf and one.grad is not None:
                        found.append(one.grad)
            except (ReferenceError, RuntimeError):
                continue
    return storages(found, integers=False)


def build(recipe: dict[str, Any], rank: int, world: int) -> tuple[Any, Any, Any]:
    """Engine and data of a recipe, as `launch/train.py` makes them."""
    written = load_recipe(recipe)
    task = tasks.load_task(written.dsso.task, 0)
    dtype = getattr(torch, written.precision.dtype)
    bundle = tasks.models.load(written.dsso.model, task, written.dsso.task, dtype)
    bundle = tasks.adapters.apply(bundle, written.dsso.peft)
    data = tasks.prepare(task, bundle, written.dsso.task)
    place = engines.Environment(
        rank, rank, world, "env" if world > 1 or written.dsso.engine != "single" else "none"
    )
    return engines.build(bundle.model, written.resolved(world), place), data, written.resolved(world)


def window(engine: EngineBase, data: Any, step: int) -> dict[str, int]:
    """One optimizer step; what was alive when that was most, at the end of a backward pass."""
    size, gas = engine.micro_batch_size, engine.gradient_accumulation_steps
    total = size * gas * engine.world_size
    indices = tasks.data.global_batch(len(data.train), total, 0, step)
    terms = sum(data.terms(i) for i in indices) / (engine.world_size * gas)
    seen: dict[int, int] = {}
    parts = list(tasks.data.micro_batches(indices, engine.rank, engine.world_size, gas))
    own = engine.backward

    def backward(loss: Tensor, terms: float | Tensor | None = None) -> None:
        nonlocal seen
        own(loss, terms=terms)
        seen = max(seen, alive(), key=lambda found: sum(found.values()))

    def batches() -> Iterator[estimates.MicroBatch]:
        for part in parts:
            batch = data.collate([data.train[i] for i in part], part)
            yield data.micro_batch(engine, batch, terms, 0, step)

    engine.backward = backward  # type: ignore[method-assign]
    try:
        estimates.run(engine, batches)
        for part in parts:
            batch = data.collate([data.train[i] for i in part], part)
            engine.backward(data.loss_sum(engine(**batch.inputs), batch) / terms, terms=terms)
            engine.step()
    finally:
        del engine.backward
    return seen


class Sums:
    """Follows the memory of all statistics: how much there is, and the most there was."""

    def __init__(self) -> None:
        self.now = self.most = 0
        allocate, forget = FactorSum._allocate, FactorSum.forget

        def grow(one: FactorSum) -> None:
            allocate(one)
            self.now += self._size(one)
            self.most = max(self.most, self.now)

        def shrink(one: FactorSum) -> None:
            self.now -= self._size(one)
            forget(one)

        self._original = allocate, forget
        FactorSum._allocate, FactorSum.forget = grow, shrink  # type: ignore[method-assign]

    @staticmethod
    def _size(one: FactorSum) -> int:
        return sum(part.untyped_storage().nbytes() for part in one.parts)

    def stop(self) -> None:
        """Put the class back."""
        FactorSum._allocate, FactorSum.forget = self._original  # type: ignore[method-assign]


def count(recipe: dict[str, Any]) -> dict[str, Any]:
    """Run two steps, the second without statistics, and count."""
    rank, world = collectives.rank(), collectives.world_size()
    # Modules and what they hold, a million objects, are not looked through again at every count.
    gc.collect()
    gc.freeze()
    before = set(alive())
    engine, data, _resolved = build(recipe, rank, world)
    if isinstance(engine, ForwardEngine):
        return count_forward(engine, data)
    optimizer = engine.optimizer
    entered: list[dict[int, int]] = []
    step = type(optimizer).step

    def watched(self: Any, closure: Any = None) -> Any:
        if not self.dry_run:
            entered.append(alive())
        return step(self, closure)

    type(optimizer).step = watched
    sums = Sums()
    try:
        engine.train()
        window(engine, data, 0)
        passed = window(engine, data, 1)
    finally:
        type(optimizer).step = step
        sums.stop()
    method = optimizer.method
    weights = storages([*engine.module.parameters(), *engine.module.buffers()])
    masters = storages(optimizer._buffers)
    state = storages(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    factors = 0 if method is None else method.state_bytes()
    known = {**weights, **masters, **state}
    if method is not None:
        # Of K-FAC also what a rank keeps without being the one that writes it into a checkpoint.
        kept = [f.state() for f in method.factors.values()] if hasattr(method, "factors") else []
        known |= storages(t for state_ in (*kept, method.state_tensors()) for t in state_.values())

    def rest(seen: dict[int, int]) -> int:
        return sum(size for key, size in seen.items() if key not in known and key not in before)

    out = {
        "rank": rank,
        "weights": sum(weights.values()),
        "masters": sum(size for key, size in masters.items() if key not in weights),
        "moments": sum(size for key, size in state.items() if key not in {**weights, **masters}),
        "factors": factors,
        "state_bytes": engine.state_bytes(),
        "gradients": rest(entered[-1]),
        "gradients_in_pass": rest(passed),
        "sums": sums.most,
        "sent": method.statistics.sent if hasattr(method, "statistics") else 0,
    }
    engine.close()
    return out


def count_forward(engine: ForwardEngine, data: Any) -> dict[str, Any]:
    """A step from forward passes: what is kept, and what the model's parameters take besides while blocks run."""
    parameters = list(engine.module.parameters())
    weights = storages([*parameters, *engine.module.buffers()])
    masters = storages(piece.base for piece in engine._weights.pieces)
    method = engine._forward.forward_method
    state = storages(t for kinds in method.state.values() for t in kinds.values())
    most = calls = 0

    def look(*_: Any) -> None:
        nonlocal most
        now = storages(engine.module.parameters())
        most = max(most, sum(size for key, size in now.items() if key not in weights))

    for part in engine.module.modules():
        part.register_forward_pre_hook(look)
    gas = engine.gradient_accumulation_steps
    share = (0, 1, gas * engine.world_size) if method.spread else (engine.rank, engine.world_size, gas)
    size = engine.micro_batch_size * gas * engine.world_size
    parts = tasks.data.micro_batches(tasks.data.global_batch(len(data.train), size, 0, 0), *share)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        total = torch.zeros(2, dtype=torch.float64)
        for one in parts:
            batch = data.collate([data.train[i] for i in one], one)
            total[0] += data.loss_sum(engine(**batch.inputs), batch)
            total[1] += sum(data.terms(i) for i in one)
        return total

    engine.step(closure)
    calls = 0
    engine.step(closure)
    out = {
        "rank": engine.rank,
        "weights": sum(weights.values()),
        "masters": sum(size for key, size in masters.items() if key not in weights),
        "moments": sum(state.values()),
        "state_bytes": engine.state_bytes(),
        "beside": most,
        "passes": calls,
    }
    engine.close()
    return out


def main() -> None:
    """Run all cases in one process group."""
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    place = engines.launch_environment()
    engines.start(place, 5.0)
    torch.set_num_threads(1)
    lines = []
    for name, recipe in cases:
        lines.append({"name": name, **count(recipe)})
    gathered = collectives.gather_objects(lines)
    if collectives.rank() == 0:
        text = "\n".join(json.dumps(line) for mine in gathered for line in mine)
        Path(sys.argv[2]).write_text(text, encoding="utf-8")
    collectives.barrier()
    # Tearing gloo down under load may abort on one of its threads.
    os._exit(0)


if __name__ == "__main__":
    main()
