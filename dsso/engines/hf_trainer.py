"""A Hugging Face Trainer that takes its steps with a method of dsso: DeepSpeed ZeRO, FSDP2, DDP, one process.

    trainer = Trainer(model, TrainingArguments(deepspeed="recipe.json", …), …)
    dsso.attach(trainer)
    trainer.train()

The Trainer stays what it is, and so do its data, its logs and its checkpoints. Replaced are, on this one object: how it
makes the optimizer; its loss, which is weighted by its terms; `accelerator.backward`, before which the method is told
their number; and the optimizer's part of a checkpoint.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines import portable
from dsso.engines.build import make_optimizer
from dsso.engines.hf_engines import (
    CarriedOptimizer,
    TrainerReplicaEngine,
    TrainerRowsEngine,
    TrainerZeroEngine,
    around,
    shapes_of,
    whole_shapes,
)
from dsso.engines.hf_loss import TrainerLoss
from dsso.engines.hf_recipe import Asked, Source, from_deepspeed, from_recipe, refuse
from dsso.engines.quiet import quiet
from dsso.errors import RecipeError, RunError
from dsso.parallel import collectives

_SCHEDULER = "scheduler.pt"
"""Name that the Trainer gives to the learning rate's part of a checkpoint."""

_NOT_WITH = {
    "torch_compile": "curvature is measured by hooks, which compilation drops",
    "auto_find_batch_size": "an optimizer is bound to the passes that are made with it|set per_device_train_batch_size",
    "optim": "the optimizer is the recipe's|leave optim out, or the call of dsso.attach",
    "optim_args": "the optimizer is the recipe's|write optimizer.params",
    "parallelism_config": "every rank holds whole layers and whole sequences",
}
"""TrainingArguments that are refused: name -> why | what to do instead."""


def attach(
    trainer: Any, config: Source | None = None, example_inputs: Mapping[str, Any] | None = None
) -> Attachment:
    """Let a Trainer take its steps with a method of dsso; called once, before `train`.

    Args:
        trainer: a `transformers.Trainer`, or an object of a subclass.
        config: without DeepSpeed, `{"optimizer": {"type": …, "params": {…}}}` or the path of a file that holds it;
            with DeepSpeed the optimizer stands in the DeepSpeed configuration, and None is given.
        example_inputs: see `dsso.initialize`.

    Returns:
        What was attached; also `trainer.dsso`.

    Raises:
        RecipeError: for whatever cannot work; nothing was changed that a training without dsso would notice.
    """
    if getattr(trainer, "dsso", None) is not None:
        raise RunError("dsso is attached to this Trainer already", where="dsso.attach")
    args = trainer.args
    refuse(args, "dsso", _NOT_WITH)
    _check(trainer)
    if not trainer.is_deepspeed_enabled:
        asked = from_recipe(args, config)
    elif config is not None:
        raise RecipeError(
            "with DeepSpeed the optimizer stands in the DeepSpeed configuration",
            where="dsso.attach",
            got=config if isinstance(config, str) else type(config).__name__,
            remedy='call dsso.attach(trainer), with an "optimizer" section in TrainingArguments(deepspeed=…)',
        )
    else:
        quiet()
        plugin = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
        asked = from_deepspeed(args, args.deepspeed, plugin.config)
        # The Trainer compares these two, and neither clips anything now.
        plugin.mismatches = [
            line for line in plugin.mismatches if not line.startswith("- ds gradient_clipping=")
        ]
    if collectives.rank() == 0:
        for note in asked.notes:
            sys.stderr.write(f"note: {note}\n")
    trainer.dsso = Attachment(trainer, asked, example_inputs)
    found: Attachment = trainer.dsso
    return found


def _check(trainer: Any) -> None:
    """Refuse a Trainer whose optimizer is somebody else's, or whose model nobody can measure."""
    args = trainer.args
    if args.n_gpu > 1:
        raise RecipeError(
            "torch.nn.DataParallel copies the model to every device and drops the hooks that measure curvature",
            where="TrainingArguments",
            got=f"{args.n_gpu} devices in one process",
            remedy="start through torchrun or deepspeed, or show the process one device (CUDA_VISIBLE_DEVICES)",
        )
    for name in ("optimizer", "lr_scheduler", "optimizer_cls_and_kwargs"):
        if getattr(trainer, name, None) is not None:
            raise RecipeError(
                "the Trainer has one already, which would not be used",
                where=f"Trainer.{name}",
                got=type(getattr(trainer, name)).__name__,
                remedy="make the Trainer without it; the schedule is TrainingArguments.lr_scheduler_type",
            )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise RecipeError(
            "FSDP version 1 flattens parameters, so that no layer has a weight of its own",
            where="fsdp_config.version",
            got=getattr(plugin, "fsdp_version", 1),
            allowed="2",
            remedy='set TrainingArguments(fsdp=True, fsdp_config={"version": 2, …})',
        )
    if getattr(plugin, "activation_checkpointing", False) or _offloads(plugin):
        name = (
            "activation_checkpointing"
            if getattr(plugin, "activation_checkpointing", False)
            else "cpu_offload"
        )
        instead = "; TrainingArguments(gradient_checkpointing=True) works" if name.startswith("act") else ""
        raise RecipeError(
            "does not work with dsso in this version",
            where=f"fsdp_config.{name}",
            got=True,
            remedy=f"set it to false{instead}",
        )
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise RecipeError(
            "the model was cut when it was loaded, so that its layers are not whole",
            where="model",
            got="distributed_config",
            remedy="load it whole; DeepSpeed or FSDP2 cut it when training starts",
        )


def _offloads(plugin: Any) -> bool:
    return "CPUOffloadPolicy" in type(getattr(plugin, "cpu_offload", None)).__name__


class Attachment:
    """A method of dsso in a Trainer.

    Args:
        trainer: the Trainer, whose methods are replaced.
        asked: the optimizer.
        example: keyword arguments of a small forward pass, or None.

    Attributes:
        engine: of dsso, from the moment the Trainer has prepared its model; `engine.health()` and `engine.table()` say
            what a run would.
    """

    def __init__(self, trainer: Any, asked: Asked, example: Mapping[str, Any] | None) -> None:
        self.engine: TrainerZeroEngine | TrainerReplicaEngine | TrainerRowsEngine | None = None
        self._trainer, self._asked, self._example = trainer, asked, example
        self._optimizer: CarriedOptimizer | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._handles: list[Any] = []
        self._skipped = 0.0
        self._loss = TrainerLoss(trainer, trainer.compute_loss)
        for owner, name, own in (
            (trainer, "create_optimizer", self._create_optimizer),
            (trainer, "compute_loss", self._compute_loss),
            (trainer, "log", self._log),
            (trainer, "_save_optimizer_and_scheduler", self._save),
            (trainer, "_load_optimizer_and_scheduler", self._load),
            (trainer.accelerator, "prepare", self._prepare),
            (trainer.accelerator, "backward", self._backward),
        ):
            plain = getattr(owner, name)
            setattr(owner, name, functools.wraps(plain)(functools.partial(own, plain)))

    # -- optimizer and engine -----------------------------------------------------------------------------------

    def _create_optimizer(self, plain: Any, model: nn.Module | None = None) -> Any:
        """The Trainer's way to its optimizer."""
        trainer = self._trainer
        if trainer.optimizer is not None:
            return trainer.optimizer
        self._let_go()
        module = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_deepspeed_enabled:
            dtype = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.dtype()
            if dtype != torch.float32 and not any(hasattr(p, "ds_id") for p in module.parameters()):
                # DeepSpeed does so anyway; before the method looks at the model, because an adapter in fp32 reads a
                # cast copy, and its layers would not be seen to read one tensor.
                module.to(dtype)
        self._shapes = shapes_of(module)
        with whole_shapes(module):
            made = make_optimizer(
                module,
                self._asked.kind,
                self._asked.config,
                trainer.args.device,
                example=self._example,
                carrier=CarriedOptimizer,
            )
        assert isinstance(made, CarriedOptimizer)
        self._optimizer = trainer.optimizer = made
        return made

    def _let_go(self) -> None:
        """Take the hooks of an earlier training off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.engine is not None:
            self.engine._close_hooks()
        elif self._optimizer is not None and self._optimizer.method is not None:
            self._optimizer.method.close()
        self.engine = self._optimizer = None

    def _prepare(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        """The way of accelerate to a model that trains; afterwards the optimizer learns where its pieces are."""
        ours = self._optimizer
        if ours is None or self.engine is not None or not any(one is ours for one in args):
            return plain(*args, **kwargs)
        trainer = self._trainer
        module = trainer.accelerator.unwrap_model(next(one for one in args if isinstance(one, nn.Module)))
        ours.dry_run = True
        found = plain(*args, **kwargs)
        ours.dry_run = False
        prepared = next(one for one in found if isinstance(one, nn.Module))
        sizes = (trainer.args.gradient_accumulation_steps, trainer.args.per_device_train_batch_size)
        engine = self.engine = around(prepared, module, ours, trainer.args.device, sizes, self._shapes)
        self._handles = [module.register_forward_pre_hook(lambda *_: engine._before_forward())]
        if isinstance(engine, TrainerZeroEngine):
            loads = engine._ds.load_checkpoint
            engine._ds.load_checkpoint = functools.wraps(loads)(functools.partial(self._load_zero, loads))
        else:
            if isinstance(engine, TrainerRowsEngine):
                self._handles.append(ours.register_step_pre_hook(lambda *_: engine.bring()))
            self._handles.append(ours.register_step_post_hook(lambda *_: engine.stepped(0)))
        return found

    # -- passes -------------------------------------------------------------------------------------------------

    def _compute_loss(self, plain: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()) or self.engine is None:
            return plain(model, inputs, *args, **kwargs)
        smoother = getattr(self._trainer, "label_smoother", None)
        popped = smoother is not None or self._trainer.compute_loss_func is not None
        config = getattr(self.engine.module, "config", None)
        if popped and getattr(config, "is_encoder_decoder", False) and "decoder_attention_mask" not in inputs:
            raise RunError(
                "the model is not given its labels, so which tokens of the decoder are padding is not known",
                where="TrainingArguments.label_smoothing_factor"
                if smoother is not None
                else "compute_loss_func",
                remedy='let the data collator add "decoder_attention_mask", or set label_smoothing_factor to 0 and'
                " leave compute_loss_func out",
            )
        return self._loss.of(model, inputs, *args, **kwargs)

    def _backward(self, plain: Any, loss: Tensor, **kwargs: Any) -> None:
        """A micro-batch's backward pass; under DeepSpeed the last of a window ends in its step."""
        engine, accelerator = self.engine, self._trainer.accelerator
        if engine is None or self._loss.scale is None or self._loss.terms is None:
            plain(loss, **kwargs)
            return
        method, last = engine.optimizer.method, bool(accelerator.sync_gradients)
        assert method is not None
        scale = self._loss.scale / engine._loss_scale()
        if isinstance(engine, TrainerZeroEngine) and kwargs.get("scale_wrt_gas", True):
            scale = scale * engine.gradient_accumulation_steps
        engine._open()
        engine.pending += 1
        method.before_backward(scale, self._loss.terms, last)
        self._loss.scale = None
        taken = engine.optimizer.steps
        plain(loss, **kwargs)
        if last and isinstance(engine, TrainerZeroEngine):
            engine.stepped(taken)

    # -- logs ---------------------------------------------------------------------------------------------------

    def _log(self, plain: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's figures of a training step, and dsso's about the same."""
        if "loss" in logs and self.engine is not None:
            health = self.engine.health()
            for name, value in health.items():
                logs.setdefault(name, value)
            skipped = health.get("skipped_steps", 0.0)
            if skipped > self._skipped and collectives.rank() == 0:
                warnings.warn(
                    f"{skipped - self._skipped:g} step(s) were skipped on all ranks, because a loss or a gradient was"
                    f" not finite ({health.get('consecutive_skips', 0.0):g} in a row)",
                    stacklevel=2,
                )
            self._skipped = skipped
        return plain(logs, *args, **kwargs)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save(self, plain: Any, output_dir: str) -> None:
        """The optimizer's part of a checkpoint; collective."""
        trainer, engine = self._trainer, self.engine
        if engine is None:
            plain(output_dir)
            return
        if isinstance(engine, TrainerZeroEngine):
            plain(output_dir)
        else:
            if isinstance(engine, TrainerRowsEngine):
                save_rows(trainer, output_dir)
            save_scheduler(trainer, output_dir)
        portable.write(engine, Path(output_dir), {})

    def _load(self, plain: Any, checkpoint: str | None) -> None:
        """Go on with the optimizer of a checkpoint; collective."""
        if checkpoint is None or self.engine is None:
            plain(checkpoint)
            return
        if isinstance(self.engine, TrainerZeroEngine):
            # DeepSpeed's engine has read its part, and ours with it.
            plain(checkpoint)
            return
        portable.read(self.engine, Path(checkpoint))
        load_scheduler(self._trainer, checkpoint)

    def _load_zero(self, plain: Any, load_dir: str, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's own part where it was written by as many ranks at the same stage, and then dsso's."""
        engine = self.engine
        assert isinstance(engine, TrainerZeroEngine)
        found = portable.describe(Path(load_dir))
        same = (found["engine"], found["world_size"], found["stage"]) == (
            engine.name,
            engine.world_size,
            engine.stage,
        )
        result = plain(load_dir, *args, **kwargs) if same else (load_dir, {})
        if not same and engine.rank == 0:
            sys.stderr.write(
                f"note: {load_dir} was written by {found['world_size']} rank(s) of {found['engine']}"
                f" (stage {found['stage']}): frozen weights stay those that the model was made with\n"
            )
        portable.read(engine, Path(load_dir))
        return result


def save_scheduler(trainer: Any, output_dir: str) -> None:
    """Write the learning rate's part of a checkpoint as the Trainer would."""
    if trainer.args.should_save:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)


def load_scheduler(trainer: Any, checkpoint: str) -> None:
    """Read the learning rate's part of a checkpoint as the Trainer would."""
    path = Path(checkpoint) / _SCHEDULER
    if not path.exists():
        raise RunError(
            "the checkpoint has no schedule of the learning rate",
            where=str(path),
            remedy="go on from a checkpoint that was written without save_only_model",
        )
    trainer.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))


def save_rows(trainer: Any, output_dir: str) -> None:
    """Write FSDP2's weights as the Trainer reads them back; collective."""
    from accelerate.utils import save_fsdp_model
    from transformers import trainer as of_transformers

    more = of_transformers.get_fsdp_ckpt_kwargs()
    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_model(plugin, trainer.accelerator, trainer.model, output_dir, **more)
