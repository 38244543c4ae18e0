"""Runs through the Trainer, and the same ones through `launch/train.py`, in the processes of one launcher.

`hf_worker.py RUNS.json`: the runs of the file, one after the other. Results are what runs write: checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments

import dsso
from dsso import tasks
from dsso.recipe import load_recipe
from dsso.seeding import seed_everything
from dsso.tasks.data import global_batch
from tests.engines import hf_cpu  # first: it says where DeepSpeed runs
from tests.launch.runs import changed

STEPS = 6
STOP = 4
"""Step of the checkpoint that runs go on from."""


@dataclass
class Run:
    """One run.

    Attributes:
        name: of its output directory.
        changes: to the recipe, by dotted path.
        how: `launch`, or the Trainer's way: `deepspeed`, `plain` (DDP or one process), `fsdp`, `forward`.
        resume: run whose checkpoint after `STOP` steps is gone on from.
        arguments: more TrainingArguments.
        sharded: the model is cut by ZeRO as it is made.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    how: str = "launch"
    resume: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False


RECIPE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {
        "type": "KFAC",
        # With the absolute damping a step depends on the scale of the factors.
        "params": {
            "lr": 0.02,
            "damping": 0.03,
            "damping_mode": "absolute",
            "factor_interval": 2,
            "inverse_interval": 3,
        },
    },
    "dsso": {
        "model": {"name": "tiny-t5", "dropout": 0.0},
        "peft": {"type": "lora", "r": 4},
        "task": {"name": "builtin", "max_length": 96, "train_examples": 96, "eval_examples": 16},
        "train": {"max_steps": STEPS, "eval_interval": STEPS, "log_interval": 2, "save_interval": STOP},
    },
}
"""Targets of several tokens, so that micro-batches differ in their terms; steps 5 and 6 lie within an interval."""


def recipe(changes: dict[str, Any]) -> dict[str, Any]:
    """`RECIPE` with values set by dotted path; None removes a key."""
    return changed(RECIPE, changes)


class Ordered(Dataset[Any]):
    """Training examples in the order in which `launch/train.py` takes them."""

    def __init__(self, data: Any, batch: int, seed: int, steps: int) -> None:
        self.data = data
        self.indices = [i for step in range(steps) for i in global_batch(len(data.train), batch, seed, step)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, at: int) -> Any:
        return self.indices[at], self.data.train[self.indices[at]]


class InOrder(Sampler[int]):
    """As they come."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.count = len(data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


class OrderedTrainer(Trainer):
    """Takes the examples as they come."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return InOrder(self.train_dataset)


class OrderedForwardTrainer(dsso.ForwardTrainer):
    """Takes the examples as they come."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return InOrder(self.train_dataset)


def made(raw: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The recipe, its model and its data, as `launch/train.py` makes them."""
    written = load_recipe(raw)
    config = written.dsso
    seed_everything(config.train.seed)
    task = tasks.load_task(config.task, config.train.seed)
    bundle = tasks.models.load(config.model, task, config.task, written.precision.torch_dtype)
    bundle = tasks.adapters.apply(bundle, config.peft)
    return written, bundle, tasks.prepare(task, bundle, config.task)


def trainer_of(run: Run, out: Path, world: int) -> Any:
    """The Trainer of a run."""
    raw = recipe(run.changes)
    written, bundle, data = made(raw)
    gas = raw["gradient_accumulation_steps"]
    params = raw["optimizer"]["params"]
    own = {key: value for key, value in raw.items() if key not in ("dsso", "train_batch_size")}
    own["optimizer"] = {**raw["optimizer"], "params": {**params, "lr": "auto"}}
    settings: dict[str, Any] = {
        "output_dir": str(out / run.name),
        "per_device_train_batch_size": raw["train_batch_size"] // (world * gas),
        "gradient_accumulation_steps": gas,
        "learning_rate": params["lr"],
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "logging_steps": 2,
        "save_steps": STOP,
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    if run.how == "deepspeed":
        settings["deepspeed"] = own
    if run.how == "fsdp":
        settings |= {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
    arguments = TrainingArguments(**settings | run.arguments)

    def collate(examples: Sequence[Any]) -> dict[str, Any]:
        batch = data.collate([one for _, one in examples], [index for index, _ in examples])
        labels = batch.labels
        if bundle.family == "causal":
            # Ours stand where they are predicted; a model of transformers moves its own there.
            labels = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], 1)
        return {**batch.inputs, "labels": labels}

    ordered = Ordered(data, raw["train_batch_size"], written.dsso.train.seed, STEPS)
    model: Any = bundle.model
    if run.sharded:
        import deepspeed

        # As from_pretrained does where a configuration with stage 3 is alive.
        deepspeed.zero.Init(module=model, config_dict_or_path=arguments.hf_deepspeed_config.config)
    given = {"args": arguments, "train_dataset": ordered, "data_collator": collate}
    if run.how == "forward":
        return OrderedForwardTrainer(model, optimizer={"optimizer": own["optimizer"]}, **given)
    trainer = OrderedTrainer(model, **given)
    dsso.attach(trainer, None if run.how == "deepspeed" else {"optimizer": own["optimizer"]})
    return trainer


def forget() -> None:
    """Let another Trainer make its accelerator anew; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else the next model is cut as it is made
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        if name != "ACCELERATE_TORCH_DEVICE":
            del os.environ[name]


def through_launch(run: Run, out: Path) -> None:
    """The same by `launch/train.py`, in this process."""
    from dsso import engines
    from launch import train

    # A file for each rank: none has to wait for another's.
    path = out / f"{run.name}.{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(recipe(run.changes)))
    words = ["launch/train.py", "--ds_config", str(path), "--output_dir", str(out / run.name)]
    # The other runs need the process group.
    with mock.patch.object(engines, "stop"), mock.patch.object(sys, "argv", words):
        assert train.main() == 0


def through_trainer(run: Run, out: Path, world: int) -> None:
    """The run, and its figures in `figures.json`."""
    trainer = trainer_of(run, out, world)
    if run.resume is not None:
        name = f"checkpoint-{STOP}"
        if trainer.args.process_index == 0:
            shutil.copytree(out / run.resume / name, out / run.name / name)
        trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=True if run.resume else None)
    if trainer.args.process_index == 0:
        (out / run.name / "figures.json").write_text(json.dumps(trainer.state.log_history))
    forget()


def main() -> None:
    """All runs of a file."""
    found = json.loads(Path(sys.argv[-1]).read_text())
    hf_cpu.allow()
    out, world = Path(found["out"]), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    for one in found["runs"]:
        run = Run(**one)
        if run.how == "launch":
            through_launch(run, out)
        else:
            through_trainer(run, out, world)


def write(runs: Sequence[Run], out: Path) -> Path:
    """Runs for another process."""
    path = out / "runs.json"
    path.write_text(json.dumps({"out": str(out), "runs": [asdict(run) for run in runs]}))
    return path


if __name__ == "__main__":
    main()
