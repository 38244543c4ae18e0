"""One rank of the checks of the FSDP2 and DDP engines: every scenario on two ranks in one process group."""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dsso.engines import launch_environment, make_optimizer, start, stop
from dsso.engines.ddp import DDPEngine
from dsso.engines.fsdp2 import FSDP2Engine
from dsso.engines.rows import Rows
from dsso.errors import RecipeError, RunError
from dsso.linalg import triangle
from dsso.optim.kfac import Config
from dsso.parallel.collectives import broadcast_object, gather_objects
from tests.scenarios import report

CPU = torch.device("cpu")
EAGER: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}


class Block(nn.Module):
    """17 rows, which two ranks cannot share evenly, and a branch that a batch may leave unused."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 17), nn.Linear(17, 8)
        self.side = nn.Linear(8, 8, bias=False)

    def forward(self, h: Tensor, side: bool = True) -> Tensor:
        out = h + self.second(torch.tanh(self.first(self.norm(h))))
        return out + self.side(h) if side else out


class Net(nn.Module):
    """Blocks between a tied embedding and head, and a scale of one row: the second rank holds nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale, self.left = nn.Linear(8, 1), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, side: bool = True, left: bool = True, depth: int = 3) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks[:depth]:
            h = block(h, side)
        h = h * torch.sigmoid(self.scale(h))
        return self.head(self.left(h) if left else h)


def model(seed: int = 0) -> Net:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Net()


def engine(
    kind: str, dtype: str = "float32", net: nn.Module | None = None, gas: int = 2, **settings: Any
) -> Any:
    """An engine around the same weights every time; small learning rate, momentum and decay as by default."""
    net = model() if net is None else net
    number = getattr(torch, dtype)
    if kind == "ddp":
        net.to(number)
    optimizer = make_optimizer(net, "KFAC", Config(**settings), CPU)
    if kind == "ddp":
        made: Any = DDPEngine(net, optimizer, CPU, gas, 4)
    else:
        made = FSDP2Engine(net, optimizer, CPU, gas, 4, dtype=number)
    made.train()
    return made


def step(
    e: Any, seed: int, poison: float | None = None, between: Callable[[], None] | None = None, **forward: Any
) -> None:
    """One window.

    Args:
        e: the engine.
        seed: of the data.
        poison: multiplies the loss of rank 1's last micro-batch.
        between: called before each micro-batch.
        forward: for rank 1's forward passes alone.
    """
    generator = torch.Generator().manual_seed(100 * seed + e.rank)
    for micro in range(e.gradient_accumulation_steps):
        ids = torch.randint(11, (4, 3), generator=generator)
        chosen = forward if e.rank == 1 or "depth" in forward else {}
        if between is not None:
            between()
        logits = e(ids, **chosen).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(1).flatten())
        if poison is not None and e.rank == 1 and micro + 1 == e.gradient_accumulation_steps:
            loss = loss * poison
        e.backward(loss, terms=12)
        e.step()


def apart(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> list[str]:
    """Names of parameters that differ by more than the tolerance, relative to the largest element."""
    return [
        f"{n}: {(mine[n] - v).abs().max():.2e}"
        for n, v in theirs.items()
        if not (mine[n] - v).abs().max() <= tolerance * v.abs().max()
    ]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of parameters that differ at all."""
    return [n for n in before if not torch.equal(before[n], after[n])]


def nan_on_one_rank(kind: str, dtype: str) -> list[str]:
    """All ranks drop the step, nothing moves, and training goes on."""
    e = engine(kind, dtype, **EAGER)
    for seed in range(2):
        step(e, seed)
    before = e.gathered_state_dict()
    step(e, 2, float("nan"))
    problems = [f"moved: {n}" for n in changed(before, e.gathered_state_dict())]
    skipped = gather_objects(e.health()["skipped_steps"])
    if skipped != [1.0, 1.0]:
        problems.append(f"skipped: {skipped}")
    for seed in range(3, 5):
        step(e, seed)
    after = e.gathered_state_dict()
    if e.rank == 0 and not changed(before, after):
        problems.append("did not go on")
    tensors = {**e.optimizer.method.state_tensors(), **after}
    problems += [f"poisoned: {n}" for n, v in tensors.items() if not torch.isfinite(v.float()).all()]
    e.close()
    return problems


def unused(kind: str, forward: dict[str, Any]) -> list[str]:
    """A layer that one rank's loss does not reach, or (`depth`) a whole block that no rank's does."""
    found = []
    for chosen in (kind, "ddp"):
        e = engine(chosen, **EAGER)
        for seed in range(4):
            step(e, seed, **(forward if seed % 2 else {}))
        found.append(e.gathered_state_dict())
        health = e.health()
        e.close()
        if health["skipped_steps"] or health["layers_without_factors"]:
            return [str(health)]
    return apart(*found, 1e-5) if launch_environment().rank == 0 else []


def unused_in_an_older_torch(forward: dict[str, Any]) -> list[str]:
    """The same where torch reduces only the gradients that exist."""
    method = FSDPModule.set_reduce_scatter_unused_params
    del FSDPModule.set_reduce_scatter_unused_params
    try:
        return unused("fsdp2", forward)
    finally:
        FSDPModule.set_reduce_scatter_unused_params = method  # type: ignore[method-assign]


def shards(trained: str) -> list[str]:
    """Every weight, frozen ones too, is held once over the ranks; frozen ones do not move."""
    net = model()
    if trained == "adapters":
        net.requires_grad_(False)
        for block in net.blocks:
            block.side.requires_grad_(True)
    start_ = {n: p.detach().clone() for n, p in net.named_parameters()}
    whole = [weakref.ref(p) for p in net.parameters()]
    e = engine("fsdp2", net=net, **EAGER)
    problems = []
    step(e, 9)
    gc.collect()
    kept = sum(ref() is not None and not isinstance(ref(), DTensor) for ref in whole)
    if kept:
        problems.append(f"{kept} whole parameters stay in memory")
    for name, weight in e._rows.weights.items():
        held = gather_objects(weight.to_local().numel())
        if sum(held) != start_[name].numel():
            problems.append(f"{name}: {held} of {start_[name].numel()} elements")
    if gather_objects(e._rows.weights["scale.weight"].to_local().numel()) != [8, 0]:
        problems.append("no shard is empty")
    if e._hold != (trained == "adapters"):
        problems.append(f"gradients are held whole: {e._hold}")
    for seed in range(3):
        step(e, seed)
    after = e.gathered_state_dict(trainable_only=False)
    moved = changed(start_, after) if e.rank == 0 else []
    wanted = sorted(n for n, p in net.named_parameters() if p.requires_grad)
    if e.rank == 0 and sorted(moved) != wanted:
        problems.append(f"moved: {moved}")
    if sum(gather_objects(sum(b.numel() for b in e._buffers.values()))) != sum(
        start_[n].numel() for n in wanted
    ):
        problems.append("the optimizer holds more than its shards")
    e.close()
    return problems


def rank_0_decides(kind: str) -> list[str]:
    """Ranks that were given different weights start from those of rank 0."""
    e = engine(kind, net=model(seed=launch_environment().rank))
    wanted = dict(model(seed=0).named_parameters())
    found = broadcast_object(e.gathered_state_dict())
    e.close()
    return changed({n: wanted[n].detach() for n in found}, found)


def evaluation_within_a_window(kind: str) -> list[str]:
    """Passes without gradients between micro-batches change nothing, and loaded weights are the ones computed with."""
    ids = torch.arange(12).view(4, 3) % 11
    found = []
    for disturbed in (False, True):
        e = engine(kind, **EAGER)

        def evaluate(e: Any = e) -> None:
            e.eval()
            with torch.no_grad():
                e(ids)
            e.train()

        for seed in range(3):
            step(e, seed, between=evaluate if disturbed else None)
        found.append(e.gathered_state_dict())
        if not disturbed:
            e.close()
    problems = changed(*found) if e.rank == 0 else []
    other = model(seed=5)
    with torch.no_grad():
        e(ids)
        e.load_weights({n: p.detach() for n, p in other.named_parameters()})
        if (e(ids) - other(ids)).abs().max() > 1e-6:
            problems.append("the loaded weights are not used")
    for tensors, words in (
        ({"x": torch.ones(1)}, "no such"),
        ({"scale.weight": torch.ones(1)}, "another size"),
    ):
        try:
            e.load_weights(tensors)
            problems.append(f"not refused: {tensors}")
        except RunError as error:
            if words not in str(error):
                problems.append(str(error))
    e.close()
    return problems


def checkpoint(writer: str, reader: str, dtype: str) -> list[str]:
    """Saved in the middle of an interval and loaded by a fresh engine, the run goes on as the uninterrupted one."""
    folder = broadcast_object(tempfile.mkdtemp() if launch_environment().rank == 0 else None)
    settings: dict[str, Any] = {"factor_interval": 2, "inverse_interval": 4, "tau": 0.3}
    straight = engine(writer, dtype, **settings)
    for seed in range(3):
        step(straight, seed)
    straight.save_checkpoint(folder, "tag", {"epoch": 7})
    for seed in range(3, 7):
        step(straight, seed)
    resumed = engine(reader, dtype, net=model(seed=3), **settings)
    resumed.eval()
    with torch.no_grad():  # weights gathered before loading must not be used after it
        resumed(torch.zeros(1, 1, dtype=torch.int64))
    resumed.train()
    client = resumed.load_checkpoint(folder, "tag")
    problems = [] if client == {"epoch": 7} and resumed.global_steps == 3 else [f"client state: {client}"]
    for seed in range(3, 7):
        step(resumed, seed)
    mine, theirs = straight.gathered_state_dict(), resumed.gathered_state_dict()
    if straight.rank == 0:
        problems += changed(mine, theirs) if writer == reader else apart(theirs, mine, 1e-5)
    straight.close()
    resumed.close()
    return problems


def no_host_synchronization(kind: str, dtype: str) -> list[str]:
    """Nothing in a window asks the device for a value; only decisions of the step before are read, a step late."""
    e = engine(kind, dtype, **EAGER)
    for seed in range(3):
        step(e, seed)
    asked: list[str] = []
    real = {
        name: getattr(Tensor, name) for name in ("item", "cpu", "numpy", "__bool__", "__float__", "__int__")
    }

    def watched(name: str) -> Any:
        def ask(self: Tensor, *arguments: Any, **options: Any) -> Any:
            frames = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_stack()[-4:-1]]
            asked.append(f"{name} in {' < '.join(reversed(frames))}")
            return real[name](self, *arguments, **options)

        return ask

    free = triangle.asking_is_free
    triangle.asking_is_free = lambda flag: False  # what a CPU may ask is not what is watched here
    for name in real:
        setattr(Tensor, name, watched(name))
    try:
        for seed in range(3, 6):
            step(e, seed)
    finally:
        triangle.asking_is_free = free
        for name, method in real.items():
            setattr(Tensor, name, method)
    before = len(asked)
    e.health()
    e.close()
    return sorted(set(asked[:before]))


def refusals() -> list[str]:
    """Models that cannot be cut, and a layout that is not what it is read to be."""
    problems = []

    def refused(words: str, kind: type[Exception], **options: Any) -> None:
        try:
            engine("fsdp2", **options)
            problems.append(f"not refused: {words}")
        except kind as error:
            if words not in str(error):
                problems.append(str(error))

    scalar = model()
    scalar.gain = nn.Parameter(torch.ones(()))
    refused("scalar parameter gain", RecipeError, net=scalar)
    refused("bf16.enabled", RecipeError, net=model().bfloat16())
    real = Rows._first_elements
    Rows._first_elements = lambda self: {  # type: ignore[method-assign]
        n: max(at - 1, 0) for n, at in real(self).items()
    }
    try:
        refused("are not the rows", RunError)
    finally:
        Rows._first_elements = real  # type: ignore[method-assign]
    return problems


def text_is_written_as_by_one_process(peft: str) -> list[str]:
    """`generate` reaches the encoder and the blocks past the root's forward: the weights must be there."""
    from dsso import tasks
    from dsso.config import ModelConfig, PeftConfig, TaskConfig

    config = TaskConfig(max_length=32, train_examples=8, eval_examples=4)
    task = tasks.load_task(config, 0)
    bundle = tasks.models.load(ModelConfig(name="tiny-t5", init="random", dropout=0.0), task, config)
    bundle = tasks.adapters.apply(bundle, PeftConfig(type=peft))
    ids = torch.arange(24).view(2, 12) + 5
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    plain: Any = copy.deepcopy(bundle.model).eval()
    wanted = plain.generate(**options)
    e = engine("fsdp2", net=bundle.model, **EAGER)
    e.eval()
    with torch.no_grad():
        found = e.module.generate(**options)
    e.train()
    logits = e(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids).logits
    e.backward(logits.float().square().mean(), terms=1)
    e.step()
    e.close()
    return [] if torch.equal(wanted, found) else [f"{found.tolist()} instead of {wanted.tolist()}"]


def main() -> None:
    """Run all scenarios."""
    out = Path(sys.argv[1])
    start(launch_environment(), 1.0)
    torch.set_num_threads(1)
    plan: list[tuple[Any, tuple[Any, ...]]] = [(refusals, ())]
    only = sys.argv[2:]
    for kind in ("fsdp2", "ddp"):
        plan += [(nan_on_one_rank, (kind, dtype)) for dtype in ("float32", "bfloat16")]
        plan += [(no_host_synchronization, (kind, dtype)) for dtype in ("float32", "bfloat16")]
        plan += [(rank_0_decides, (kind,)), (evaluation_within_a_window, (kind,))]
    plan += [(unused, ("fsdp2", case)) for case in ({"side": False}, {"left": False}, {"depth": 2})]
    plan += [(unused_in_an_older_torch, (case,)) for case in ({"side": False}, {"left": False})]
    pairs = [("fsdp2", "fsdp2"), ("ddp", "ddp"), ("fsdp2", "ddp"), ("ddp", "fsdp2")]
    plan += [(checkpoint, (*pair, "float32")) for pair in pairs]
    plan += [(checkpoint, ("fsdp2", "fsdp2", "bfloat16"))]
    plan += [(shards, (trained,)) for trained in ("all", "adapters")]
    plan += [(text_is_written_as_by_one_process, (peft,)) for peft in ("none", "lora")]
    for scenario, arguments in plan:
        if only and scenario.__name__ not in only:
            continue
        report(out, scenario, arguments)
    stop()


main()
