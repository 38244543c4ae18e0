"""One rank of the checks of the DeepSpeed seam: every scenario on two ranks in one process group."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from dsso.engines import launch_environment, make_optimizer, start
from dsso.engines.deepspeed import DeepSpeedEngine
from dsso.errors import RecipeError, RunError
from dsso.optim.kfac import Config
from dsso.parallel.collectives import broadcast_object, gather_objects
from tests.scenarios import report

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Net(nn.Module):
    """Two branches, one of which a batch may leave unused; a norm for the base method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 17), nn.LayerNorm(17)
        self.left, self.right = nn.Linear(17, 4), nn.Linear(17, 4, bias=False)

    def forward(self, x: Tensor, branch: str = "both") -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        if branch == "left":
            return self.left(h)
        return self.left(h) + self.right(h)


def engine(
    stage: int, dtype: str = "fp32", accumulate: str | None = None, scale: int = 12, **settings: Any
) -> Any:
    """A DeepSpeed engine around the same weights every time."""
    torch.manual_seed(0)
    model = Net()
    config: dict[str, Any] = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "sub_group_size": 10**12},
        "steps_per_print": 10**9,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] |= {"initial_scale_power": scale, "hysteresis": 1, "loss_scale_window": 100}
    if accumulate:
        config["data_types"] = {"grad_accum_dtype": accumulate}
    made = DeepSpeedEngine(model, make_optimizer(model, "KFAC", Config(**settings), CPU), CPU, config)
    made.train()
    made.input_dtype = DTYPES[dtype]
    return made


def step(e: Any, seed: int, poison: float | None = None, branch: str = "both", only_rank: int = 1) -> None:
    """One window; `poison` multiplies the loss of one rank's second micro-batch."""
    generator = torch.Generator().manual_seed(100 * seed + e.rank)
    for micro in range(2):
        x, y = torch.randn(4, 8, generator=generator), torch.randint(4, (4,), generator=generator)
        chosen = branch if e.rank == only_rank else "both"
        loss = nn.functional.cross_entropy(e(x.to(e.input_dtype), branch=chosen).float(), y)
        if poison is not None and e.rank == only_rank and micro == 1:
            loss = loss * poison
        e.backward(loss, terms=4)
        e.step()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of parameters that differ."""
    return [n for n in before if not torch.equal(before[n], after[n])]


def nan_on_one_rank(stage: int, dtype: str, accumulate: str | None) -> list[str]:
    """All ranks drop the step, nothing moves, and training goes on."""
    problems = []
    e = engine(stage, dtype, accumulate, factor_interval=1, inverse_interval=1)
    for seed in range(2):
        step(e, seed)
    before = e.gathered_state_dict()
    step(e, 2, float("nan"))
    moved = changed(before, e.gathered_state_dict())
    if moved:
        problems.append(f"moved: {moved}")
    skipped = gather_objects(e.health()["skipped_steps"])
    if skipped != [1.0, 1.0]:
        problems.append(f"skipped: {skipped}")
    for seed in range(3, 5):
        step(e, seed)
    after = e.gathered_state_dict()
    if e.rank == 0 and not changed(before, after):
        problems.append("did not go on")
    bad = [k for k, v in e.optimizer.method.state_tensors().items() if not torch.isfinite(v.float()).all()]
    bad += [n for n, v in after.items() if not torch.isfinite(v).all()]
    if bad:
        problems.append(f"poisoned: {bad}")
    e.close()
    return problems


def overflow(stage: int) -> list[str]:
    """fp16: DeepSpeed drops the step and lowers the scale; statistics of the dropped windows are dropped too."""
    e = engine(stage, "fp16", scale=24, factor_interval=1, inverse_interval=1)
    for seed in range(14):
        step(e, seed)
    health = e.health()
    problems = []
    if not (health["skipped_steps"] >= 1 and health["loss_scale"] < 2**24):
        problems.append(f"no overflow: {health}")
    if e.optimizer.steps + e.skipped_steps != 14 or e.optimizer.steps < 2:
        problems.append(f"steps: {e.optimizer.steps} taken, {e.skipped_steps} dropped")
    if not all(torch.isfinite(v.float()).all() for v in e.optimizer.method.state_tensors().values()):
        problems.append("poisoned")
    # The factors are on the scale of one loss term whatever the loss scale: compare with fp32.
    other = engine(stage, "fp32", factor_interval=1, inverse_interval=1, lr=1e-9, momentum=0.0)
    half = engine(stage, "fp16", scale=8, factor_interval=1, inverse_interval=1, lr=1e-9, momentum=0.0)
    for made in (other, half):
        step(made, 0)
    for key, factor in half.optimizer.method.factors.items():
        mine, theirs = factor.matrix(), other.optimizer.method.factors[key].matrix()
        if not (mine - theirs).abs().max() <= 0.02 * theirs.abs().max() > 0:
            problems.append(f"{key} is not on the scale of a loss term")
    if not sum(gather_objects(len(half.optimizer.method.factors))):
        problems.append("nothing was compared")
    for made in (e, other, half):
        made.close()
    return problems


def checkpoint(stage: int, dtype: str, accumulate: str | None) -> list[str]:
    """Saved in the middle of an interval, loaded by a fresh engine, the run goes on bit by bit."""
    folder = broadcast_object(tempfile.mkdtemp() if launch_environment().rank == 0 else None)
    settings: dict[str, Any] = {"factor_interval": 2, "inverse_interval": 4, "tau": 0.3}
    if dtype == "fp16":
        settings["scale"] = 20  # the first steps overflow
    straight = engine(stage, dtype, accumulate, **settings)
    for seed in range(3):
        step(straight, seed)
    straight.save_checkpoint(folder, "tag", {"epoch": 7})
    written = straight.engine_state()
    for seed in range(3, 7):
        step(straight, seed)
    resumed = engine(stage, dtype, accumulate, **settings)
    client = resumed.load_checkpoint(folder, "tag")
    problems = [] if client == {"epoch": 7} and resumed.global_steps == 3 else [f"client state: {client}"]
    if resumed.engine_state() != written:
        problems.append(f"state of the engine: {resumed.engine_state()} instead of {written}")
    if dtype == "fp16" and not (written["skipped_steps"] and written["loss_scaler"]["cur_scale"] < 2**20):
        problems.append(f"no overflow: {written}")
    for seed in range(3, 7):
        step(resumed, seed)
    differing = changed(straight.gathered_state_dict(), resumed.gathered_state_dict())
    mine, theirs = straight.optimizer.method.state_tensors(), resumed.optimizer.method.state_tensors()
    differing += changed(mine, theirs)
    if differing:
        problems.append(f"differ: {differing}")
    straight.close()
    resumed.close()
    return problems


def unused(stage: int) -> list[str]:
    """A layer that is not used in a window keeps its factors; at stage 0 one rank alone may leave it out.

    (From stage 1 on DeepSpeed's own reduction needs the same gradients on every rank.)
    """
    e = engine(stage, factor_interval=1, inverse_interval=1)
    step(e, 0)
    kept = averages(e, "right/")
    for seed in range(1, 4):
        step(e, seed, branch="left", only_rank=1 if stage == 0 else e.rank)
    now, problems = averages(e, "right/"), []
    if sum(gather_objects(len(kept))) < 4:
        problems.append("nothing was compared")
    # At stage 0 rank 0 goes on using it: what it measures counts.
    problems += [
        f"{k} {'changed' if stage else 'stayed'}" for k in kept if bool(stage) != torch.equal(kept[k], now[k])
    ]
    health = e.health()
    e.close()
    if health["skipped_steps"] or health["layers_without_factors"]:
        problems.append(str(health))
    return problems


def averages(e: Any, prefix: str) -> dict[str, Tensor]:
    """Running averages and weights of this rank's factors whose names begin so."""
    own = {k: f for k, f in e.optimizer.method.factors.items() if k.startswith(prefix)}
    return {k: f.matrix() for k, f in own.items()} | {f"{k}/weight": f.weight.clone() for k, f in own.items()}


def foreign_layout(stage: int) -> list[str]:
    """A partition that is not where its tables say is refused on all ranks."""
    real = DeepSpeedEngine._layout

    def shifted(self: Any) -> Any:
        from dataclasses import replace

        buffers, spans = real(self)
        if self.rank == 1:
            spans = [replace(s, offset=max(s.offset - 1, 0)) for s in spans]
        return buffers, spans

    DeepSpeedEngine._layout = shifted  # type: ignore[method-assign]
    try:
        engine(stage)
    except RunError as error:
        return [] if "partition" in str(error) else [str(error)]
    finally:
        DeepSpeedEngine._layout = real  # type: ignore[method-assign]
    return ["not noticed"]


def fp16_without_support() -> list[str]:
    """DeepSpeed refuses fp16 on a CPU: a message, not a traceback of its own."""
    try:
        engine(2, "fp16")
    except RecipeError as error:
        return [] if "fp16" in str(error) and "bf16 or fp32" in str(error) else [str(error)]
    return ["not refused"]


def main() -> None:
    """Run all scenarios."""
    out = Path(sys.argv[1])
    start(launch_environment(), 2.0)
    torch.set_num_threads(1)
    precisions = [(s, "fp32", None) for s in range(4)]
    precisions += [
        (0, "bf16", None),
        (1, "bf16", "fp32"),
        (1, "bf16", "bf16"),
        (2, "bf16", None),
        (3, "bf16", None),
    ]
    plan: list[tuple[Any, tuple[Any, ...]]] = [(fp16_without_support, ())]
    for scenario in (nan_on_one_rank, checkpoint):
        plan += [(scenario, args) for args in precisions]
    plan += [(unused, (s,)) for s in range(4)] + [(foreign_layout, (s,)) for s in (1, 2, 3)]
    for scenario, args in plan:
        report(out, scenario, args)
    # DeepSpeed has no fp16 on the CPU, though torch has: let it, to see loss scaling and overflow.
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: list(DTYPES.values())
    for stage in (1, 2, 3):
        report(out, overflow, (stage,))
        report(out, checkpoint, (stage, "fp16", None))
    torch.distributed.destroy_process_group()


main()
