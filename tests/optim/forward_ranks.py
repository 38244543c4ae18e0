"""One of the ranks of the checks of methods that need only losses; see `tests.scenarios`."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsso import tasks
from dsso.config import ModelConfig, TaskConfig
from dsso.engines import launch_environment, make_forward_optimizer, start, stop
from dsso.engines.forward import ForwardEngine
from dsso.engines.forward_rows import ForwardFSDP2Engine, GatheredWeights
from dsso.engines.forward_zero3 import ForwardZero3Engine
from dsso.engines.shown import MasterWeights
from dsso.errors import RecipeError, RunError
from dsso.optim import resolve
from dsso.parallel import collectives, noise
from dsso.parallel.collectives import gather_objects
from tests.optim.forward import Head
from tests.scenarios import report

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


METHODS: dict[str, dict[str, Any]] = {
    "ZO_Adam": {"lr": 1e-3},
    "ZO_AdaMM": {"lr": 1e-3},
    "ZO_AdaMU": {"lr": 1e-3, "t3": 9},
    "HiZOO": {"smooth": 0.1},
}


class Net(nn.Module):
    """Blocks, rows that no number of ranks divides, fewer rows than ranks, a tied head, a vector of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=7)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in range(2)
        )
        self.gate, self.shift = nn.Linear(6, 1), nn.Parameter(torch.tensor([-0.0] + [0.1] * 5))
        self.norm = nn.LayerNorm(6)
        self.head = Head(6)
        self.head.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.shift
        for layer in self.layers:
            h = h + layer(h)
        return self.head(self.norm(h * torch.sigmoid(self.gate(h))))


def net(seed: int) -> Net:
    """With weights of a seed."""
    torch.manual_seed(seed)
    return Net()


def classifier() -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))


def made(kind: str, model: nn.Module, method: str = "MeZO", **settings: Any) -> ForwardEngine:
    """An engine: `replica`, `fsdp2` or `zero3`."""
    optimizer = make_forward_optimizer(model, method, resolve(method).Config(**settings))
    if kind == "replica":
        return ForwardEngine(model, optimizer, CPU, 1, 4)
    if kind == "fsdp2":
        return ForwardFSDP2Engine(model, optimizer, CPU, 1, 4)
    dtype = next(model.parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return ForwardZero3Engine(model, optimizer, CPU, config)


def closure(engine: ForwardEngine, step: int, ranks: int, rank: int, together: int = 1) -> Any:
    """Losses of this rank's share of 8 examples, each in a pass of its own: the share has no say in them.

    All ranks make as many passes, because in those of a sharded model they gather weights together.
    """
    if engine._forward.forward_method.spread:
        ranks, rank = 1, 0
    generator = torch.Generator().manual_seed(step)
    every = torch.randint(11, (8, 3), generator=generator)
    shares = [every[r * 8 // ranks : (r + 1) * 8 // ranks].split(together) for r in range(ranks)]

    def evaluate() -> Tensor:
        total = torch.zeros(2, dtype=torch.float64)
        for number in range(max(map(len, shares))):
            counts = number < len(shares[rank])
            one = shares[rank][number] if counts else every[:1]
            logits = engine(one).double().flatten(0, 1)
            if not counts:
                continue
            total[0] += nn.functional.cross_entropy(logits, one.roll(1, 1).flatten(), reduction="sum")
            total[1] += one.numel()
        return total

    return evaluate


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process knows of no others."""
    known = collectives.is_distributed
    collectives.is_distributed = lambda: False
    try:
        yield
    finally:
        collectives.is_distributed = known


def run(
    engine: ForwardEngine, ranks: int, rank: int, steps: int, first: int = 0
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps, and the weights that this rank can tell."""
    losses = [float(engine.step(closure(engine, step, ranks, rank))) for step in range(first, first + steps)]
    return losses, engine.gathered_state_dict()


def the_course_of_one_process(kind: str, dtype: str, method: str = "MeZO", **settings: Any) -> list[str]:
    """Losses to 1e-6, though every rank began with other weights; with signs for directions the weights bit by bit."""
    world, rank = collectives.world_size(), collectives.rank()
    settings = {"lr": 1e-2, "directions": 2, "weight_decay": 0.1, **settings}
    engine = made(kind, net(rank).to(DTYPES[dtype]), method, **settings)
    mine, weights = run(engine, world, rank, 8)
    with alone():
        one, theirs = run(made("replica", net(0).to(DTYPES[dtype]), method, **settings), 1, 0, 8)
    problems = [
        f"step {i}: {a} {b}"
        for i, (a, b) in enumerate(zip(mine, one, strict=True))
        if not abs(a - b) <= 1e-6 * abs(b)
    ]
    exact = settings.get("noise") == "rademacher"
    for name, found in weights.items():
        distance = (found.double() - theirs[name].double()).abs().max()
        if not distance <= (0.0 if exact else 1e-6):
            problems.append(f"{name}: {distance}")
    if set(mine) != set(gather_objects(mine)[0]):
        problems.append("the ranks tell other losses")
    if settings.get("spread") and engine.health()["forwards"] != 16 // world:
        problems.append(f"{engine.health()['forwards']} passes")
    if rank == 0 and weights.keys() != theirs.keys():
        problems.append(f"weights of other names: {list(weights)}")
    engine.close()
    return problems


def steps_of_no_length(
    kind: str, dtype: str, steps: int, rounding: str = "nearest", method: str = "MeZO", **settings: Any
) -> list[str]:
    """They change no bit, on no rank."""
    settings = {"lr": 1e-2, "rounding": rounding, **settings}
    engine = made(kind, net(0).to(DTYPES[dtype]), method, **settings)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    world, rank = collectives.world_size(), collectives.rank()
    before = engine.gathered_state_dict()
    for step in range(steps):
        engine.step(closure(engine, step % 3, world, rank, 8))
    after = engine.gathered_state_dict()
    as_bits = torch.int32 if dtype == "fp32" else torch.int16
    problems = [n for n, v in before.items() if not torch.equal(v.view(as_bits), after[n].view(as_bits))]
    if not engine.health()["slope"] > 0:
        problems.append("nothing was perturbed")
    engine.close()
    return problems


def what_cannot_be_spread() -> list[str]:
    """Three directions over two or four ranks."""
    engine = made("replica", net(0), directions=3, spread=True)
    try:
        engine.step(closure(engine, 0, 1, 0))
    except RunError as error:
        return [] if "3 direction(s) cannot be spread evenly" in str(error) else [str(error)]
    return ["no error"]


def a_bad_loss_on_one_rank(kind: str, bad_rank: int) -> list[str]:
    """All ranks skip together, and go on together."""
    world, rank = collectives.world_size(), collectives.rank()
    engine = made(kind, net(0), lr=1e-2)
    run(engine, world, rank, 1)
    before = engine.gathered_state_dict()
    plain, bad = closure(engine, 1, world, rank), float("nan") if rank == bad_rank else 1.0
    engine.step(lambda: plain() * bad)
    after = engine.gathered_state_dict()
    problems = [n for n in before if not torch.equal(before[n], after[n])]
    if set(gather_objects(engine.health()["skipped_steps"])) != {1.0}:
        problems.append(str(engine.health()))
    run(engine, world, rank, 1, 2)
    moved = engine.gathered_state_dict()
    if rank == 0 and all(torch.equal(moved[n], after[n]) for n in after):
        problems.append("no step is taken afterwards")
    engine.close()
    return problems


def what_a_rank_keeps(kind: str, dtype: str, method: str = "MeZO", **settings: Any) -> list[str]:
    """Its share of the weights, of the fp32 copy where there is one and of the method's state, and no more."""
    world = collectives.world_size()
    model = net(0).to(DTYPES[dtype])
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    rows = {n: p.shape[0] for n, p in model.named_parameters()}
    engine = made(kind, model, method, **{"lr": 1e-2, **settings})
    own = engine._forward.forward_method
    pieces = {piece.name: piece.base.numel() for piece in engine._weights.pieces}
    copies = isinstance(engine._weights, MasterWeights)
    gathered = kind == "fsdp2" and dtype == "fp32" and not own.shows_state
    if copies == gathered or isinstance(engine._weights, GatheredWeights) == copies:
        return [type(engine._weights).__name__]
    problems = []
    for name, size in sizes.items():
        most = -(-rows[name] // world) * (size // rows[name]) if kind == "fsdp2" else -(-size // world)
        if pieces[name] > most:
            problems.append(f"{name}: {pieces[name]} of {size}")
    kept = 4 * sum(pieces.values()) * (copies + len(own.states))
    if engine.state_bytes() != kept:
        problems.append(f"state of {engine.state_bytes()} bytes, not {kept}")
    engine.close()
    return problems


def ranks_that_have_gone_apart(bad_rank: int) -> list[str]:
    """The digest names the parameter, on all ranks."""
    world, rank = collectives.world_size(), collectives.rank()
    engine = made("replica", net(0))
    before = engine.digest()
    run(engine, world, rank, 1)
    problems = [] if before != engine.digest() else ["a step changes nothing"]
    if rank == bad_rank:
        with torch.no_grad():
            next(p for p in engine._weights.pieces if p.name == "gate.weight").base[3] += 1e-3
    try:
        engine.digest()
    except RunError as error:
        told = str(error)
        return problems if "gate.weight" in told and "other weights" in told else [told]
    return [*problems, "nothing is noticed"]


def a_checkpoint_goes_on(
    kind: str, into: str, dtype: str, folder: str, method: str = "MeZO", **settings: Any
) -> list[str]:
    """Another engine takes over what one wrote: exactly with MeZO and signs, else to rounding."""
    world, rank = collectives.world_size(), collectives.rank()
    settings = {"lr": 1e-2, "noise": "rademacher" if method == "MeZO" else "gaussian", **settings}
    straight, tag = (
        made(kind, net(0).to(DTYPES[dtype]), method, **settings),
        f"{kind}-{into}-{dtype}-{method}",
    )
    run(straight, world, rank, 3)
    straight.save_checkpoint(folder, tag, {"at": 3})
    theirs, wanted = run(straight, world, rank, 3, 3)
    straight.close()
    other = made(into, net(1).to(DTYPES[dtype]), method, **settings)
    other.load_checkpoint(folder, tag)
    mine, found = run(other, world, rank, 3, 3)
    other.close()
    if rank == 0 and found.keys() != wanted.keys():
        return [f"weights of other names: {sorted(found.keys() ^ wanted.keys())}"]
    if method == "MeZO":
        problems = [] if mine == theirs else [f"{mine} {theirs}"]
        return problems + [n for n, value in found.items() if not torch.equal(value, wanted.get(n, value))]
    problems = [f"{a} {b}" for a, b in zip(mine, theirs, strict=True) if not abs(a - b) <= 1e-6 * abs(b)]
    return problems + [n for n, v in found.items() if not (v - wanted.get(n, v)).abs().max() <= 1e-6]


def a_checkpoint_on_other_ranks(kind: str, folder: str, method: str, **settings: Any) -> list[str]:
    """What all ranks wrote goes on in one process, moments included."""
    world, rank = collectives.world_size(), collectives.rank()
    tag = f"{kind}-alone-{method}"
    straight = made(kind, net(0), method, **settings)
    run(straight, world, rank, 3)
    straight.save_checkpoint(folder, tag, {"at": 3})
    theirs, wanted = run(straight, world, rank, 3, 3)
    straight.close()
    if rank:
        return []  # in a process of its own there is no other rank than 0
    with alone():
        other = made("replica", net(1), method, **settings)
        other.load_checkpoint(folder, tag)
        mine, found = run(other, 1, 0, 3, 3)
    other.close()
    problems = [f"{a} {b}" for a, b in zip(mine, theirs, strict=True) if not abs(a - b) <= 1e-6 * abs(b)]
    return problems + [n for n, v in wanted.items() if not (v - found[n]).abs().max() <= 1e-6]


def directions_of_its_own_on_slices(kind: str) -> list[str]:
    """Refused where ranks write the slices that others compute with, whatever the recipe says of the precision."""
    try:
        made(kind, net(0).to(torch.bfloat16), lr=1e-2, spread=True, directions=8)
    except RecipeError as error:
        return [] if "slices that all compute with" in str(error) else [str(error)]
    return ["no error"]


def sums_of_uneven_shares(rank: int) -> list[str]:
    """F1 from the counts of all ranks, of which one has more examples than the others, is that of the whole."""
    world, me = collectives.world_size(), collectives.rank()
    model = classifier()
    engine = made("replica", model, lr=1e-2, eps=0.3)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 6, generator=generator), torch.randint(2, (40,), generator=generator)
    own = torch.arange(40) % (world + 3)
    mine = (own >= world) | (own == me) if me == rank else own == me
    evaluations: list[list[float]] = []

    def counts(picked: Tensor) -> Tensor:
        made = engine(x[picked])[:, 0] > 0
        wanted = y[picked] == 1
        return torch.stack([(made & wanted).sum(), (made & ~wanted).sum(), (~made & wanted).sum()])

    def closure() -> Tensor:
        evaluations.append(counts(torch.ones(40, dtype=torch.bool)).tolist())
        return counts(mine)

    def value(sums: Tensor) -> Tensor:
        return 1 - 2 * sums[:, 0] / (2 * sums[:, 0] + sums[:, 1] + sums[:, 2])

    found = float(engine.step(closure, value))
    whole = value(torch.tensor(evaluations[-2:], dtype=torch.float64))
    slope = abs(float(whole[0] - whole[1])) / 0.6
    problems = [] if found == float(whole.mean()) else [f"{found}, not {whole.tolist()}"]
    problems += [] if slope > 0 and abs(engine.health()["slope"] - slope) < 1e-12 else [str(engine.health())]
    weights = {n: v.tolist() for n, v in engine.gathered_state_dict().items()}
    problems += ["the ranks differ"] if any(one != weights for one in gather_objects(weights)) else []
    return problems


def sums_of_another_number(rank: int) -> list[str]:
    """All ranks end together when one has another number of sums than the others."""
    model = classifier()
    engine = made("replica", model)
    try:
        engine.step(lambda: torch.ones(3 + (collectives.rank() == rank)), lambda sums: sums[:, 0])
    except RunError as error:
        return [] if "on every rank and always as many" in str(error) else [str(error)]
    return ["no error"]


def texts_under_perturbed_weights(kind: str, dtype: str) -> list[str]:
    """What is written with perturbed weights, several times, is what a replica writes; then the weights are back."""
    config = TaskConfig(max_length=32, train_examples=8, eval_examples=4)
    task = tasks.load_task(config, 0)
    name = ModelConfig(name="tiny-t5", init="random", dropout=0.0)
    bundle = tasks.models.load(name, task, config, DTYPES[dtype])
    options = {
        "input_ids": torch.arange(24).view(2, 12) + 5,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    def write(name: str, start: int, base: Tensor, out: Tensor) -> None:
        noise.add(out, base, noise.Direction(3, name), start, 0.05)

    def written(engine: ForwardEngine) -> list[Tensor]:
        engine.eval()
        model: Any = engine.module
        found = []
        with torch.no_grad():
            for shown in (write, write, None):
                with engine._weights.showing(shown):
                    found += [torch.stack(model.generate(**options).logits).double() for _ in range(2)]
        return found

    replica = made("replica", copy.deepcopy(bundle.model))
    wanted = written(replica)
    replica.close()
    engine = made(kind, bundle.model)
    found = written(engine)
    engine.close()
    bound = 1e-4 if dtype == "fp32" else 5e-2
    problems = [
        f"{i}: {(a - b).abs().max()}"
        for i, (a, b) in enumerate(zip(found, wanted, strict=True))
        if not (a - b).abs().max() <= bound * b.abs().max()
    ]
    if not (wanted[0] - wanted[-1]).abs().max() > 0.1 * wanted[-1].abs().max():
        problems.append("the perturbation changes nothing")
    return problems


def all_steps_of_no_length(out: Path, kind: str, steps: int) -> None:
    """In every format that the engine has."""
    for dtype in ("fp32", "bf16", "fp16"):
        if (kind, dtype) != ("zero3", "fp16"):  # DeepSpeed refuses fp16 on a CPU
            report(out, steps_of_no_length, (kind, dtype, steps))
    report(out, steps_of_no_length, (kind, "bf16", steps, "stochastic"))


def main() -> None:
    """Run all scenarios; or, with a number of steps, those of no length alone."""
    out, steps = Path(sys.argv[1]), int(os.environ.get("STEPS_OF_NO_LENGTH", "0"))
    start(launch_environment(), 5.0)
    torch.set_num_threads(1)
    if steps:
        for kind in ("replica", "fsdp2", "zero3"):
            all_steps_of_no_length(out, kind, steps)
        stop()
        return
    for kind in ("replica", "fsdp2", "zero3"):
        for z in ("gaussian", "rademacher"):
            for sides in (1, 2):
                report(out, the_course_of_one_process, (kind, "fp32"), noise=z, sides=sides)
        report(out, the_course_of_one_process, (kind, "bf16"), noise="rademacher")
        report(out, the_course_of_one_process, (kind, "bf16"), noise="rademacher", rounding="stochastic")
        all_steps_of_no_length(out, kind, 20)
        report(out, a_bad_loss_on_one_rank, (kind, 0))
        report(out, a_bad_loss_on_one_rank, (kind, 1))
        for method, settings in METHODS.items():
            report(out, the_course_of_one_process, (kind, "fp32", method), **settings)
    for kind in ("replica", "fsdp2"):
        report(out, the_course_of_one_process, (kind, "fp32"), spread=True, directions=8, noise="rademacher")
    report(out, what_cannot_be_spread, ())
    for kind in ("fsdp2", "zero3"):
        for dtype in ("fp32", "bf16"):
            report(out, what_a_rank_keeps, (kind, dtype))
            report(out, texts_under_perturbed_weights, (kind, dtype))
    for kind, into in (("replica", "fsdp2"), ("fsdp2", "zero3"), ("zero3", "replica"), ("zero3", "zero3")):
        report(out, a_checkpoint_goes_on, (kind, into, "bf16", str(out.parent)))
    for method, settings in METHODS.items():
        for kind in ("fsdp2", "zero3"):
            report(out, what_a_rank_keeps, (kind, "fp32", method), **settings)
            report(out, a_checkpoint_on_other_ranks, (kind, str(out.parent), method), **settings)
            # A curvature that is followed fast takes in rounding, until perturbations are below it.
            slow = settings | ({"smooth": 1e-6} if method == "HiZOO" else {})
            report(out, steps_of_no_length, (kind, "bf16", 5, "nearest", method), **slow)
        report(out, a_checkpoint_goes_on, ("fsdp2", "zero3", "fp32", str(out.parent), method), **settings)
    for kind in ("fsdp2", "zero3"):
        report(out, directions_of_its_own_on_slices, (kind,))
    for rank in (0, 1):
        report(out, sums_of_uneven_shares, (rank,))
        report(out, sums_of_another_number, (rank,))
        report(out, ranks_that_have_gone_apart, (rank,))
    stop()


if __name__ == "__main__":
    main()
