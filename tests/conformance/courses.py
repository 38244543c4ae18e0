"""One of the ranks that take eight steps with methods from forward passes, beside one process; see `table.py`.

    python -m torch.distributed.run --nproc_per_node=2 tests/conformance/courses.py OUT METHOD…

Rank 0 writes a line of JSON for every method and engine: the largest relative difference of a loss, and of a parameter
in units of its own norm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dsso.engines import launch_environment, start, stop
from dsso.parallel import collectives
from tests.conformance.forward_methods import required
from tests.optim.forward_ranks import alone, made, net, run

ENGINES = ("replica", "fsdp2", "zero3")
STEPS = 8


def apart(kind: str, method: str) -> dict[str, float]:
    """How far all ranks are from one process, though every rank began with other weights."""
    world, rank = collectives.world_size(), collectives.rank()
    settings = {**required(method), "lr": 1e-3, "directions": 2, "weight_decay": 0.1}
    engine = made(kind, net(rank), method, **settings)
    losses, weights = run(engine, world, rank, STEPS)
    engine.close()
    with alone():
        one = made("replica", net(0), method, **settings)
        wanted, theirs = run(one, 1, 0, STEPS)
        one.close()
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)),
        "weights": max(
            (float((value - theirs[name]).norm() / theirs[name].norm()) for name, value in weights.items()),
            default=0.0,
        ),
    }


def main() -> None:
    """Every method on every engine."""
    out, methods = Path(sys.argv[1]), sys.argv[2:]
    start(launch_environment(), 5.0)
    torch.set_num_threads(1)
    for method in methods:
        for kind in ENGINES:
            every = collectives.gather_objects(apart(kind, method))
            if collectives.rank() == 0:
                worst = {key: max(found[key] for found in every) for key in every[0]}
                line = {"method": method, "engine": kind, "ranks": collectives.world_size(), **worst}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    stop()


if __name__ == "__main__":
    main()
