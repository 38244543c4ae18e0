"""Legs of a run that goes on elsewhere: the same global batches at any number of ranks, stage, engine and precision.

As a script, one rank of a process group: `anywhere.py FOLDER LEGS.json` runs the legs of the file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor, nn

from dsso.curvature.labels import sample_labels
from dsso.engines import estimates, launch_environment, make_optimizer, start, stop
from dsso.engines.ddp import DDPEngine
from dsso.engines.fsdp2 import FSDP2Engine
from dsso.engines.single import SingleEngine
from dsso.optim import available, is_forward, resolve
from dsso.optim.kfac import Config

CPU = torch.device("cpu")
GLOBAL_BATCH = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"factor_interval": 2, "inverse_interval": 4, "tau": 0.3},
    "rich": {
        "factor_interval": 2,
        "inverse_interval": 4,
        "tau": 0.3,
        "low_rank": 3,
        "low_rank_above": 12,
        "block_side": 5,
        "async_delay": 2,
        "strategy": "communication_optimal",
        "base": {"type": "AdamW", "applies_to": "all"},
    },
}
"""Of K-FAC: steps 3 and 5 lie within an interval; in `rich` factorizations are under way at step 3."""
OTHERS = tuple(name for name in available() if not is_forward(name) and name != "KFAC")
"""Other methods on gradients, as they are found: what all of them have, and intervals."""


@dataclass(frozen=True)
class Leg:
    """Steps `first` to `last` in one place; weights go to `<name>.loaded.pt` and `<name>.pt`."""

    name: str
    engine: str
    """`single`, `ddp`, `fsdp2` or a ZeRO stage."""
    dtype: str = "fp32"
    load: str | None = None
    """Leg whose checkpoint is read."""
    first: int = 0
    last: int = 3
    settings: str = "plain"
    """Of K-FAC, or the type of another method."""


def method_of(settings: str, momentum: float = 0.9) -> tuple[str, Any]:
    """Type and parameters of the method."""
    if settings in SETTINGS:
        return "KFAC", Config(**SETTINGS[settings], momentum=momentum)
    kind = resolve(settings).Config
    intervals = {name: 2 for name in kind.model_fields if name.endswith("_interval")}
    # What is compared is how a run goes on, not what a solve makes of the rounding of differences.
    damping = {"damping": 0.3} if settings == "GAUSS_NEWTON" else {}
    return settings, kind(lr=0.01, tau=1.0, clip="post", momentum=momentum, **intervals, **damping)


class Net(nn.Module):
    """Layers of uneven sizes, so that pieces are cut anywhere; a norm for the base method, a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 17), nn.LayerNorm(17)
        self.last = nn.Linear(17, 5, bias=False)
        self.register_buffer("mean", torch.zeros(17))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(h)


def build(leg: Leg, world_size: int, momentum: float = 0.9) -> Any:
    """The engine of a leg around the same weights every time."""
    torch.manual_seed(0)
    model = Net()
    micro = GLOBAL_BATCH // (2 * world_size)
    number = torch.bfloat16 if leg.dtype == "bf16" else torch.float32
    optimizer = make_optimizer(model, *method_of(leg.settings, momentum), CPU)
    if leg.engine == "fsdp2":
        return FSDP2Engine(model, optimizer, CPU, 2, micro, dtype=number)
    if leg.engine in ("single", "ddp"):
        kind = SingleEngine if leg.engine == "single" else DDPEngine
        return kind(model.to(number), optimizer, CPU, 2, micro)
    from dsso.engines.deepspeed import DeepSpeedEngine

    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(leg.engine), "sub_group_size": 10**12},
        "steps_per_print": 10**9,
    }
    if leg.dtype != "fp32":
        config[leg.dtype] = {"enabled": True}
    made = DeepSpeedEngine(model, optimizer, CPU, config)
    made.train()
    return made


def step(engine: Any, number: int, dtype: str) -> None:
    """One window on the batch of that step, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(GLOBAL_BATCH, 8, generator=generator)
    y = torch.randint(5, (GLOBAL_BATCH,), generator=generator)
    parts = torch.arange(GLOBAL_BATCH).chunk(engine.world_size)[engine.rank].chunk(2)

    def batch(part: Tensor) -> estimates.MicroBatch:
        inputs = x[part].to(torch.bfloat16 if dtype == "bf16" else torch.float32)

        def sampled(scores: Tensor) -> Tensor:
            drawn = sample_labels(scores, "cross_entropy", 0, number, part, torch.zeros_like(part))
            return nn.functional.cross_entropy(scores, drawn)

        return estimates.MicroBatch(
            len(part),
            lambda: engine(inputs).float(),
            lambda scores: nn.functional.cross_entropy(scores, y[part]),
            sampled,
        )

    estimates.run(engine, lambda: map(batch, parts))
    for one in map(batch, parts):
        engine.backward(one.loss(one.scores()), terms=one.terms)
        engine.step()
    engine.module.mean += 1.0 + number


def run(leg: Leg, folder: Path, world_size: int) -> None:
    """Load, step, save."""
    engine = build(leg, world_size)
    if leg.load is not None:
        client = engine.load_checkpoint(folder, leg.load)
        assert client == {"leg": leg.load}, client
        assert engine.global_steps == leg.first, engine.global_steps
        keep(engine, folder / f"{leg.name}.loaded.pt")
    for number in range(leg.first, leg.last):
        step(engine, number, leg.dtype)
    engine.save_checkpoint(folder, leg.name, {"leg": leg.name})
    keep(engine, folder / f"{leg.name}.pt")
    engine.close()


def keep(engine: Any, path: Path) -> None:
    """The weights, the running mean and what the optimizer has counted, by rank 0."""
    weights = engine.gathered_state_dict()
    if engine.rank == 0:
        counts = torch.tensor([float(engine.optimizer.steps), engine.optimizer.extra_state()["base_steps"]])
        torch.save({**weights, "mean": engine.module.mean.clone(), "counts": counts}, path)


def write(legs: Sequence[Leg], path: Path) -> Path:
    """Legs for another process."""
    path.write_text(json.dumps([asdict(leg) for leg in legs]))
    return path


def main() -> None:
    """Run the legs of a file, in one process group."""
    folder, legs = Path(sys.argv[1]), [Leg(**leg) for leg in json.loads(Path(sys.argv[2]).read_text())]
    place = launch_environment()
    start(place, 2.0)
    torch.set_num_threads(1)
    for leg in legs:
        run(leg, folder, place.world_size)
    stop()


if __name__ == "__main__":
    main()
