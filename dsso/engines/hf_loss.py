"""What a Trainer's loss is of the losses of its terms.

With `num_items_in_batch` N, the terms of the whole window, a Trainer's loss of a micro-batch with n terms is

    W sum / N      where the model (or `compute_loss_func`) divides by N                    W: ranks, where N counts
    W mean         where it takes N and does not look at it (T5, BERT with a head)             those of all; else 1
    mean / steps   where there is no N                                                       steps: of accumulation

The second is not what the Trainer means: such gradients are W times the number of accumulation steps too long. Asked
for N = n and multiplied by n / N, the first two are the same, W sum / N, whose average over the ranks is the mean over
all terms of the window, however it is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dsso.curvature.masks import IGNORED_LABEL
from dsso.errors import RunError


class TrainerLoss:
    """Asks a Trainer for its loss.

    Args:
        trainer: the Trainer.
        compute: its own `compute_loss`.

    Attributes:
        terms: loss terms of the micro-batch that was asked for last.
        scale: its loss times this is the sum of the losses of its terms.
    """

    def __init__(self, trainer: Any, compute: Any) -> None:
        self._trainer, self._compute = trainer, compute
        self.terms: Tensor | None = None
        self.scale: Tensor | None = None

    @property
    def _counted(self) -> bool:
        """A number of items is given to the loss at all."""
        return bool(self._trainer.model_accepts_loss_kwargs or self._trainer.compute_loss_func is not None)

    @property
    def _ranks(self) -> int:
        """W of above."""
        averaged = self._counted and self._trainer.args.average_tokens_across_devices
        return int(self._trainer.accelerator.num_processes) if averaged else 1

    def count(self, inputs: Mapping[str, Any]) -> Tensor:
        """Loss terms of a micro-batch, from its labels.

        Raises:
            RunError: it has none.
        """
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if not isinstance(labels, Tensor):
            raise RunError(
                "the number of loss terms is not known: the batch has no labels",
                where="Trainer.compute_loss",
                got=", ".join(map(str, inputs)),
                remedy="give the model its labels (the data collator makes them)",
            )
        if "shift_labels" not in inputs and self._shifts and labels.dim() > 1:
            labels = labels[..., 1:]
        return (labels != IGNORED_LABEL).sum()

    @property
    def _shifts(self) -> bool:
        """Whether position i predicts label i + 1, so that the first label is no term."""
        told = getattr(self._trainer, "_loss_shifts_labels", None)
        if told is not None:
            return bool(told)
        config = getattr(self._trainer.model, "config", None)
        names = " ".join(getattr(config, "architectures", None) or [type(self._trainer.model).__name__])
        return "CausalLM" in names or "LMHead" in names

    def of(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch in training; arguments and result are those of `Trainer.compute_loss`.

        Raises:
            RunError: the batch has no labels that could be counted.
        """
        trainer, items = self._trainer, num_items_in_batch
        self.terms = terms = self.count(inputs)
        outputs = {"return_outputs": True} if return_outputs else {}
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if items is None or not self._counted or scaled is False:
            steps = 1 if scaled else trainer.current_gradient_accumulation_steps
            self.scale = terms * steps
            return self._compute(model, inputs, **outputs, num_items_in_batch=items)
        # A micro-batch without a term has a sum of zero, and not zero over zero.
        divisor = terms.clamp_min(1)
        found = self._compute(model, inputs, **outputs, num_items_in_batch=divisor)
        share = divisor / items
        self.scale = items / self._ranks
        return (found[0] * share, *found[1:]) if return_outputs else found * share

    def total(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a micro-batch, and the number of its terms.

        Args:
            model: what is asked for the loss.
            inputs: the micro-batch, on its device.

        Raises:
            RunError: the batch has no labels that could be counted.
        """
        terms = self.count(inputs)
        divisor = terms.clamp_min(1)
        items = divisor if self._counted else None
        # A loss may take labels out of what it is given.
        loss = self._compute(model, dict(inputs), num_items_in_batch=items)
        return loss.detach() * (divisor / self._ranks), terms
