"""One of four ranks of the checks of what K-FAC's ranks must agree on; see `tests.scenarios`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines import launch_environment, make_optimizer, start, stop
from dsso.engines.ddp import DDPEngine
from dsso.engines.environment import bound_waits
from dsso.optim._factor import Factor
from dsso.optim.kfac import Config
from dsso.parallel.collectives import gather_objects
from tests.scenarios import report

CPU = torch.device("cpu")
EAGER: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}


class Net(nn.Module):
    """A stack of layers, the last of which a batch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor, whole: bool = True) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x) if whole else x


def engine(gas: int = 1, **settings: Any) -> DDPEngine:
    """The same weights every time."""
    torch.manual_seed(0)
    net = Net()
    made = DDPEngine(net, make_optimizer(net, "KFAC", Config(**settings), CPU), CPU, gas, 4)
    made.train()
    return made


def window(e: DDPEngine, seed: int, twice: bool = False, whole: bool = True) -> None:
    """One window; `twice`: two forward passes before the backward pass."""
    generator = torch.Generator().manual_seed(100 * seed + e.rank)
    for _ in range(e.gradient_accumulation_steps):
        x, y = torch.randn(4, 6, generator=generator), torch.randint(6, (4,), generator=generator)
        loss = nn.functional.cross_entropy(e(x, whole=whole), y)
        if twice:
            loss = (loss + nn.functional.cross_entropy(e(x.flip(1), whole=whole), y)) / 2
        e.backward(loss, terms=8 if twice else 4)
        e.step()


@contextmanager
def failing(key: str) -> Iterator[None]:
    """No factorization of that factor succeeds."""
    honest = Factor.jobs

    def jobs(factor: Factor, *arguments: Any) -> Any:
        made = honest(factor, *arguments)
        if factor.dims.key != key:
            return made
        return [lambda job=job: [job()[0], torch.tensor(True)] for job in made]

    Factor.jobs = jobs  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Factor.jobs = honest  # type: ignore[method-assign]


def a_factorization_that_never_succeeds(strategy: str, delay: int) -> list[str]:
    """All ranks make the same attempts, count the same failures, give up together and go on."""
    # What fails on the last refresh of all is tried again, and not relieved by a later one.
    once = [[0, 1], [5, None]]
    e = engine(
        strategy=strategy,
        grad_worker_fraction=0.5,
        factor_interval=once,
        inverse_interval=once,
        async_delay=delay,
    )
    for seed in range(4):
        window(e, seed)
    with failing("layers.2/a"):
        for seed in range(4, 12):
            window(e, seed)
    problems = []
    health = e.health()
    told = gather_objects((health["factor_failures"], health["layers_without_factors"]))
    if set(told) != {(4.0, 0.0)}:
        problems.append(f"failures and layers without factors of the ranks: {told}")
    own = [v.tolist() for v in e.gathered_state_dict().values()]
    if any(other != own for other in gather_objects(own)):
        problems.append("the ranks have different weights")
    e.close()
    return problems


def a_dropped_window_leaves_nothing_behind(bucket_mb: float, last_on_rank_1: bool) -> list[str]:
    """The engine drops a step after the exchange has begun, on one rank further than on another."""
    found = []
    for dropped in (False, True):
        e = engine(bucket_mb=bucket_mb, overlap=True, **EAGER)
        window(e, 0)
        if dropped:
            taken = e.optimizer.step
            e.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
            window(e, 9, whole=last_on_rank_1 or e.rank != 1)
            e.optimizer.step = taken  # type: ignore[method-assign]
        for seed in range(1, 4):
            window(e, seed)
        found.append(e.gathered_state_dict())
        e.close()
    straight, disturbed = found
    return [name for name in straight if not torch.equal(straight[name], disturbed[name])]


def every_use_counts(gas: int) -> list[str]:
    """Two forward passes before a backward pass: no sum leaves before the last of them is in it."""
    found = []
    for overlap in (False, True):
        e = engine(gas=gas, overlap=overlap, bucket_mb=1e-4, **EAGER)
        window(e, 0, twice=True)
        method: Any = e.optimizer.method
        found.append({key: factor.matrix() for key, factor in method.factors.items()})
        e.close()
    after, during = found
    return [key for key in after if not torch.allclose(after[key], during[key], rtol=1e-5)]


def waits_have_an_end() -> list[str]:
    """Also those of the process group that the statistics go through."""
    e = engine(**EAGER)
    bound_waits(0.5)
    method: Any = e.optimizer.method
    limit = method.statistics._group._get_backend(CPU).options._timeout.total_seconds()
    bound_waits(2.0)
    e.close()
    return [] if limit == 30.0 else [f"{limit} seconds"]


def main() -> None:
    """Run all scenarios."""
    out = Path(sys.argv[1])
    start(launch_environment(), 2.0)
    torch.set_num_threads(1)
    for strategy in ("memory_optimal", "hybrid_optimal", "communication_optimal"):
        for delay in (0, 1):
            report(out, a_factorization_that_never_succeeds, (strategy, delay))
    for bucket_mb in (1e-4, 25.0):
        for last_on_rank_1 in (True, False):
            report(out, a_dropped_window_leaves_nothing_behind, (bucket_mb, last_on_rank_1))
    for gas in (1, 2):
        report(out, every_use_counts, (gas,))
    report(out, waits_have_an_end, ())
    stop()


main()
