"""One of the ranks of the checks of methods that need only losses; see `tests.scenarios`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines import launch_environment, make_forward_optimizer, start, stop
from dsso.engines.forward import ForwardEngine
from dsso.errors import RunError
from dsso.optim.mezo import Config
from dsso.parallel import collectives
from dsso.parallel.collectives import gather_objects
from tests.scenarios import report

CPU = torch.device("cpu")


def net(seed: int) -> nn.Module:
    """Two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))


def run(ranks: int, rank: int, steps: int, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps on batches of 16, of which this rank has its share; the weights."""
    model = net(rank)
    engine = ForwardEngine(model, make_forward_optimizer(model, "MeZO", Config(**settings)), CPU, 1, 4)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(5, (16,), generator=generator)
        mine = slice(rank * 16 // ranks, (rank + 1) * 16 // ranks)

        def closure(x: Tensor = x[mine], y: Tensor = y[mine], engine: Any = engine) -> Tensor:
            found = nn.functional.cross_entropy(engine(x).double(), y, reduction="sum")
            return torch.stack([found, torch.tensor(float(len(y)), dtype=torch.float64)])

        losses.append(float(engine.step(closure)))
    return losses, engine.gathered_state_dict()


def the_course_of_one_process(noise: str, sides: int) -> list[str]:
    """Losses to 1e-6, though every rank began with other weights; the ranks stay the same bit by bit."""
    settings = {"noise": noise, "sides": sides, "lr": 1e-2, "directions": 2}
    world, rank = collectives.world_size(), collectives.rank()
    mine, weights = run(world, rank, 30, **settings)
    known = collectives.is_distributed
    collectives.is_distributed = lambda: False
    try:
        alone, theirs = run(1, 0, 30, **settings)
    finally:
        collectives.is_distributed = known
    problems = [
        f"step {i}: {a} {b}"
        for i, (a, b) in enumerate(zip(mine, alone, strict=True))
        if not abs(a - b) <= 1e-6 * b
    ]
    problems += [n for n in theirs if not (weights[n] - theirs[n]).abs().max() <= 1e-5]
    own = {n: v.tolist() for n, v in weights.items()}
    problems += ["the ranks differ"] if any(one != own for one in gather_objects(own)) else []
    return problems


def a_bad_loss_on_one_rank(rank: int) -> list[str]:
    """All ranks skip together, and go on together."""
    model = net(0)
    engine = ForwardEngine(model, make_forward_optimizer(model, "MeZO", Config(lr=1e-2)), CPU, 1, 4)
    engine.step(
        lambda: engine(torch.ones(1, 6)).double().sum() * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 1.0])
    )
    before = engine.gathered_state_dict()
    bad = float("nan") if collectives.rank() == rank else 1.0
    engine.step(lambda: torch.tensor([bad, 1.0]))
    after = engine.gathered_state_dict()
    problems = [n for n in before if not torch.equal(before[n], after[n])]
    if set(gather_objects(engine.health()["skipped_steps"])) != {1.0}:
        problems.append(str(engine.health()))
    return problems


def sums_of_uneven_shares(rank: int) -> list[str]:
    """F1 from the counts of all ranks, of which one has more examples than the others, is that of the whole."""
    world, me = collectives.world_size(), collectives.rank()
    model = net(0)
    engine = ForwardEngine(model, make_forward_optimizer(model, "MeZO", Config(lr=1e-2, eps=0.3)), CPU, 1, 4)
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
    model = net(0)
    engine = ForwardEngine(model, make_forward_optimizer(model, "MeZO", Config()), CPU, 1, 4)
    try:
        engine.step(lambda: torch.ones(3 + (collectives.rank() == rank)), lambda sums: sums[:, 0])
    except RunError as error:
        return [] if "on every rank and always as many" in str(error) else [str(error)]
    return ["no error"]


def main() -> None:
    """Run all scenarios."""
    out = Path(sys.argv[1])
    start(launch_environment(), 2.0)
    torch.set_num_threads(1)
    for noise in ("gaussian", "rademacher"):
        for sides in (1, 2):
            report(out, the_course_of_one_process, (noise, sides))
    for rank in (0, 1):
        report(out, a_bad_loss_on_one_rank, (rank,))
        report(out, sums_of_uneven_shares, (rank,))
        report(out, sums_of_another_number, (rank,))
    stop()


main()
