"""A Hugging Face Trainer for methods that need only losses: MeZO and its kin.

    trainer = ForwardTrainer(model, args, optimizer={"optimizer": {"type": "MeZO", "params": {"lr": 1e-6}}}, …)
    trainer.train()

A step takes all micro-batches of its accumulation window, several times each and without gradients, where the Trainer's
loop would have had its last backward pass. Several ranks (torchrun) hold all weights each and share the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dsso.engines import portable
from dsso.engines.forward import ForwardEngine
from dsso.engines.hf_loss import TrainerLoss
from dsso.engines.hf_recipe import Source, no_clipping, of_forward_method, refuse
from dsso.engines.hf_trainer import load_scheduler, save_scheduler
from dsso.errors import RecipeError
from dsso.optim import resolve
from dsso.optim._probes import ForwardOptimizer
from dsso.parallel import collectives

_NOT_WITH = {
    "deepspeed": "its engine is made for gradients|leave deepspeed out; launch/train.py takes such methods to ZeRO-3",
    "fsdp": "every rank holds all weights here|leave fsdp out; launch/train.py takes such methods to FSDP2",
    "fp16": "losses are evaluated in the model's own precision|load the model with dtype=torch.float16",
    "bf16": "losses are evaluated in the model's own precision|load the model with dtype=torch.bfloat16",
    "torch_compile": "weights are swapped by hooks, which compilation drops",
    "gradient_checkpointing": "there is no backward pass that would need activations|set it to False",
    "activation_checkpointing": "there is no backward pass that would need activations|set it to False",
    "auto_find_batch_size": "the memory of a step is known after one of its passes|set per_device_train_batch_size",
    "neftune_noise_alpha": "its noise would be another one in every pass",
    "optim": "the method is given as optimizer",
    "optim_args": "the method is given as optimizer|write optimizer.params",
    "parallelism_config": "every rank holds the whole model",
}
"""TrainingArguments that are refused: name -> why | what to do instead."""


class _Carried(ForwardOptimizer):
    """The optimizer as the Trainer's loop sees it: its call for a step comes when the step has been taken."""

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        value: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """One step with a closure; nothing without."""
        return None if closure is None else super().step(closure, value)


class ForwardTrainer(Trainer):  # type: ignore[misc]
    """Trains with a method that needs only losses; everything else is the Trainer's.

    Args:
        *args: of `transformers.Trainer`.
        optimizer: `{"optimizer": {"type": "MeZO", "params": {…}}}`, or the path of a file that holds it.
        **kwargs: of `transformers.Trainer`.

    Attributes:
        engine: of dsso, once training has begun; `engine.health()` says what a run would.

    Raises:
        RecipeError: the optimizer, or an argument, cannot be used.
    """

    optimizer: Any

    def __init__(self, *args: Any, optimizer: Source, **kwargs: Any) -> None:
        given = args[1] if len(args) > 1 else kwargs.get("args")
        if given is not None:
            # Before the model is moved and processes wait for each other.
            refuse(given, "methods from losses alone", _NOT_WITH)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise RecipeError(
                "torch.nn.DataParallel copies the weights that are perturbed",
                where="TrainingArguments",
                got=f"{self.args.n_gpu} devices in one process",
                remedy="start through torchrun, or show the process one device (CUDA_VISIBLE_DEVICES)",
            )
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise RecipeError(
                "the method is given as optimizer, and the Trainer would have two",
                where="optimizers",
                remedy="leave optimizers and optimizer_cls_and_kwargs out",
            )
        self.asked = of_forward_method(optimizer, self.args)
        if getattr(self.asked.config, "spread", False) and collectives.world_size() > 1:
            raise RecipeError(
                "the Trainer gives every rank its own share of the batch, and each would need all of it",
                where="optimizer.params.spread",
                got=True,
                remedy="set it to false, or train with launch/train.py",
            )
        no_clipping(self.args, self.asked.kind)
        if collectives.rank() == 0:
            for note in self.asked.notes:
                sys.stderr.write(f"note: {note}\n")
        self.engine: ForwardEngine | None = None
        self._total = TrainerLoss(self, super().compute_loss)
        self._micro_batches: list[Any] = []
        self._plain_prepare = self.accelerator.prepare
        self.accelerator.prepare = self._prepare

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The carrier of the method."""
        if self.optimizer is None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            if not trainable:
                raise RecipeError("no parameter of the model is trainable", where="model")
            config: Any = self.asked.config
            method = resolve(self.asked.kind).Method(config)
            self.optimizer = _Carried(trainable, config.lr, method, self.asked.kind.lower())
        found: torch.optim.Optimizer = self.optimizer
        return found

    def _prepare(self, *args: Any, **kwargs: Any) -> Any:
        """The way of accelerate to a model that trains, without what reduces gradients."""
        if not any(isinstance(one, _Carried) for one in args):
            return self._plain_prepare(*args, **kwargs)
        module = next((one for one in args if isinstance(one, nn.Module)), self.model)
        carrier = next(one for one in args if isinstance(one, _Carried))
        module.to(self.args.device)
        if self.engine is not None:
            self.engine.close()
        sizes = (self.args.gradient_accumulation_steps, self.args.per_device_train_batch_size)
        self.engine = ForwardEngine(module, carrier, self.args.device, *sizes)
        return args if len(args) > 1 else args[0]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a window, which are kept until its step."""
        found = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self._micro_batches = list(found[0])
        return found

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing but for the last micro-batch of a window, with which the step is taken.

        Returns:
            The step's mean loss, or zero.
        """
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        assert self.engine is not None
        model.train()
        loss = self.engine.step(partial(self._sums, list(self._micro_batches)))
        self._micro_batches = []
        return loss.to(self.args.device, torch.float32)

    def _sums(self, micro_batches: list[Any]) -> Tensor:
        """Sum of the losses and number of terms of this rank's share, [2]."""
        found = []
        for inputs in micro_batches:
            with self.compute_loss_context_manager():
                total, terms = self._total.total(self.model, self._prepare_inputs(inputs))
            found.append(torch.stack([total.to(torch.float64), terms.to(total.device, torch.float64)]))
        return torch.stack(found).sum(dim=0)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's figures of a training step, and dsso's about the same."""
        if "loss" in logs and self.engine is not None:
            logs.pop("grad_norm", None)  # of gradients that there are not
            for name, value in self.engine.health().items():
                logs.setdefault(name, value)
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's part of a checkpoint; collective."""
        assert self.engine is not None
        save_scheduler(self, output_dir)
        portable.write(self.engine, Path(output_dir), {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Go on with the optimizer of a checkpoint; collective."""
        if checkpoint is not None and self.engine is not None:
            portable.read(self.engine, Path(checkpoint))
            load_scheduler(self, checkpoint)
