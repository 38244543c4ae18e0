"""dsso's engines around what accelerate has prepared for a Trainer: DeepSpeed's engine, FSDP2's shards, replicas.

The Trainer's loop makes the passes and calls for the step; what an engine of dsso does beside that (windows, the map of
partitions, checkpoints that any engine reads) is done here by the same classes as under `launch/train.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines.base import EngineBase
from dsso.engines.deepspeed import DeepSpeedEngine
from dsso.engines.fsdp2 import FSDP2Engine
from dsso.engines.rows import Rows
from dsso.engines.single import SingleEngine
from dsso.engines.window import WindowEngine
from dsso.errors import RecipeError, RunError
from dsso.optim._partition import PartitionOptimizer

Shapes = Mapping[str, tuple[int, ...]]
"""Whole shapes of the trained parameters, by name, in model order."""


@contextmanager
def whole_shapes(module: nn.Module) -> Iterator[None]:
    """Within it parameters that ZeRO stage 3 has cut as they were made have their shapes, and zeros for values.

    What looks at a model before it trains (which layers there are, which of them read one tensor) needs shapes and
    passes, no values: a zero that is one element in memory, however large the parameter, serves, and nothing is
    gathered.
    """
    cut: list[tuple[Any, Tensor]] = [(p, p.data) for p in module.parameters() if hasattr(p, "ds_shape")]
    try:
        for parameter, held in cut:
            parameter.data = torch.zeros((), dtype=held.dtype, device=held.device).expand(parameter.ds_shape)
        yield
    finally:
        for parameter, held in cut:
            parameter.data = held


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the trained parameters, by name, in model order."""
    return {
        name: tuple(getattr(p, "ds_shape", p.shape))
        for name, p in module.named_parameters()
        if p.requires_grad
    }


class CarriedOptimizer(PartitionOptimizer):
    """The optimizer as a Trainer carries it: what it keeps is written by `dsso.engines.portable` alone."""

    def state_dict(self) -> dict[str, Any]:
        """The groups without what is kept: no state of the size of the weights is written twice."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {"state": {}, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over rates; tensors come with dsso's own part of a checkpoint."""
        for group, found in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in found.items() if k != "params"})


class TrainerZeroEngine(DeepSpeedEngine):
    """Around a `deepspeed.DeepSpeedEngine` that accelerate has made with our optimizer.

    Args:
        ds: the engine.
        module: the unwrapped model.
        optimizer: the one that it was made with; it is attached here.
        device: of this rank.
        shapes: of the trained parameters.
    """

    def __init__(
        self, ds: Any, module: nn.Module, optimizer: PartitionOptimizer, device: torch.device, shapes: Shapes
    ) -> None:
        sizes = ds.gradient_accumulation_steps(), ds.train_micro_batch_size_per_gpu()
        EngineBase.__init__(self, module, optimizer, device, *sizes)
        self.shapes = dict(shapes)
        self.scheduler = ds.lr_scheduler
        names = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
        self._take(ds, names, {n: torch.Size(shape).numel() for n, shape in shapes.items()})

    @property
    def name(self) -> str:
        """As a recipe writes it."""
        return "deepspeed"

    def stepped(self, taken: int) -> None:
        """A window has had its step, or DeepSpeed has dropped it.

        Args:
            taken: steps of the optimizer before.
        """
        self._dropped = self._dropped + 1 if self.optimizer.steps == taken else 0
        self._after_step()


class TrainerReplicaEngine(SingleEngine):
    """Around a model that every rank has all of: one process, or torch's DistributedDataParallel, which averages.

    Args:
        module: the unwrapped model.
        optimizer: attached here.
        device: of this rank.
        sizes: gradient accumulation steps, examples per rank and micro-batch.
        shapes: of the trained parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: PartitionOptimizer,
        device: torch.device,
        sizes: tuple[int, int],
        shapes: Shapes,
    ) -> None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise RecipeError(
                    f"the trained parameter {name} is {parameter.dtype}: without DeepSpeed or FSDP2 there is no fp32"
                    " copy of it, and steps would be lost in its rounding",
                    where="model",
                    got=str(parameter.dtype),
                    allowed="torch.float32",
                    remedy="load the model in fp32 and set TrainingArguments(bf16=True), or use DeepSpeed",
                )
        super().__init__(module, optimizer, device, *sizes)

    @property
    def name(self) -> str:
        """As a recipe writes it."""
        return "single" if self.world_size == 1 else "ddp"

    def stepped(self, taken: int) -> None:
        """A window has had its step."""
        self._after_step()


class CutRows(Rows):
    """The rows of a model that accelerate has cut.

    Args:
        module: the model.
        device: of this rank.

    Raises:
        RecipeError: a trained parameter is cut in another way, or not at all.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        self.device, self._stored = device, torch.float32
        self.gathered = []
        self.units = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self.weights = {n: p for n, p in module.named_parameters() if isinstance(p, DTensor)}
        whole = [n for n, p in module.named_parameters() if p.requires_grad and n not in self.weights]
        if whole or not self.units:
            raise RecipeError(
                "FSDP2 has left a trained parameter whole",
                where=f"parameter {whole[0]}" if whole else "fsdp_config",
                remedy="leave ignored_modules out of the FSDP plugin",
            )
        self.dtype = next(iter(self.weights.values())).dtype
        self.starts = self._first_elements()
        self._verify()


class TrainerRowsEngine(FSDP2Engine):
    """Around a model that accelerate has cut by `fully_shard`.

    Args:
        module: the model.
        optimizer: attached here.
        device: of this rank.
        sizes: gradient accumulation steps, examples per rank and micro-batch.
        shapes: of the trained parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: PartitionOptimizer,
        device: torch.device,
        sizes: tuple[int, int],
        shapes: Shapes,
    ) -> None:
        WindowEngine.__init__(self, module, optimizer, device, *sizes)
        self.shapes = dict(shapes)
        rows = CutRows(module, device)
        low = [
            n
            for n, w in rows.weights.items()
            if w.requires_grad and w.dtype not in (torch.float32, torch.float64)
        ]
        if low:
            raise RecipeError(
                f"the trained parameter {low[0]} is {rows.weights[low[0]].dtype}, and steps would be lost in its"
                " rounding",
                where="model",
                allowed="torch.float32",
                remedy="set TrainingArguments(bf16=True), with which FSDP2 keeps trained weights in fp32",
            )
        self._dtype = rows.dtype
        self._take(rows, {n: torch.Size(shape).numel() for n, shape in shapes.items()})

    @property
    def name(self) -> str:
        """As a recipe writes it."""
        return "fsdp2"

    def bring(self) -> None:
        """Hand the gradients that torch has reduced to the optimizer's buffers."""
        self._bring_gradients()

    def stepped(self, taken: int) -> None:
        """A window has had its step."""
        self._drop_gradients()
        self._after_step()


def around(
    prepared: Any,
    module: nn.Module,
    optimizer: CarriedOptimizer,
    device: torch.device,
    sizes: tuple[int, int],
    shapes: Shapes,
) -> TrainerZeroEngine | TrainerReplicaEngine | TrainerRowsEngine:
    """The engine that fits what accelerate has prepared; collective.

    Args:
        prepared: what accelerate has returned in the place of the model.
        module: the unwrapped model.
        optimizer: carries the method.
        device: of this rank.
        sizes: gradient accumulation steps, examples per rank and micro-batch.
        shapes: of the trained parameters.

    Raises:
        RunError: the model has changed its parameters since the optimizer was made.
    """
    if shapes_of(module).keys() != shapes.keys():
        raise RunError("the model's trained parameters have changed", where="Trainer.train")
    if hasattr(prepared, "zero_optimization_stage"):
        return TrainerZeroEngine(prepared, module, optimizer, device, shapes)
    from torch.distributed.fsdp import FSDPModule

    if isinstance(prepared, FSDPModule):
        return TrainerRowsEngine(module, optimizer, device, sizes, shapes)
    return TrainerReplicaEngine(module, optimizer, device, sizes, shapes)
