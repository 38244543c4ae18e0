"""What a training loop may ask of an engine, whichever engine it is.

The names are those of DeepSpeed (`backward`, `step`, `save_checkpoint` …), so that a loop written for DeepSpeed
needs no change; what second-order methods need besides is `terms` in `backward` and `sampled_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """One model, one optimizer, this rank's share of the work."""

    module: nn.Module
    """The unwrapped model (under ZeRO-3 its parameters are gathered by its own forward only)."""
    device: torch.device
    rank: int
    world_size: int
    gradient_accumulation_steps: int
    micro_batch_size: int
    """Examples per rank and micro-batch."""
    global_steps: int
    """Optimizer steps taken, skipped ones included."""

    @property
    def name(self) -> str:
        """Name of the engine, as a recipe writes it."""

    @property
    def stage(self) -> int | None:
        """ZeRO stage, where there are stages."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of the model, in the engine's precision."""

    def train(self, mode: bool = True) -> Any:
        """Put the model in training mode."""

    def eval(self) -> Any:
        """Put the model in evaluation mode."""

    def backward(self, loss: Tensor, terms: float | Tensor | None = None) -> None:
        """Backward pass of one micro-batch.

        Args:
            loss: scalar, a sum of per-term losses divided by `terms`; the engine averages it over ranks and
                over the accumulation window.
            terms: the divisor. Kronecker factors live on the per-term scale and need it; methods that do not
                measure curvature ignore it.
        """

    def wants_sampled_pass(self) -> bool:
        """True when this micro-batch must be followed by `sampled_pass` (`"fisher": "sampled"`, statistics due)."""

    def sampled_pass(self, forward: Callable[[], Tensor]) -> None:
        """Measure output-gradient statistics on labels drawn from the model itself.

        Args:
            forward: runs the model on the micro-batch and returns the scalar *sum* over terms of the loss at
                sampled labels divided by `terms`, see `dsso.curvature.labels`.
        """

    def wants_estimate(self) -> Any:
        """The window of estimation that must come first, None for none; `dsso.engines.estimates` runs them."""

    def estimating(self) -> AbstractContextManager[None]:
        """Context of a window of estimation.

        Its micro-batches are passed through as in any window, `backward(loss, terms)` and `step()` each; at the end
        the averaged gradient goes to the method. Weights and moments stay, and neither the step nor the learning rate
        counts it.
        """

    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        value: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """One optimizer step when the accumulation window is complete, else nothing.

        Args:
            closure: for methods that need only losses: evaluates this rank's share of the batch and returns the sum
                of the losses and the number of loss terms, [2]. They return the mean loss; the others take none.
            value: with it the closure returns any sums, [m], and what is lowered is this pure function of the sums of
                all ranks: from [evaluations, m] to [evaluations].
        """

    def is_gradient_accumulation_boundary(self) -> bool:
        """True when the next `step()` updates the parameters."""

    def lr(self) -> float:
        """Learning rate that the next step uses."""

    def health(self) -> dict[str, float]:
        """Figures about the last step; synchronizes with the device, so call it on logging steps only.

        Keys: `update_norm`, `grad_norm`, `cos_update_grad`, `clip_scale`, `clip_events`, `skipped_steps`,
        `consecutive_skips`, `loss_scale`, and those of the method (`damping`, `factor_age`, `factor_failures` …;
        `slope`, `forwards`, `flat_steps` where only losses are needed).
        """

    def publish_figures(self, figures: Mapping[str, Any]) -> None:
        """Hand the figures of a logged step to DeepSpeed's monitors, where the recipe has any."""

    def table(self) -> list[dict[str, Any]]:
        """Rows `parameter, shape, method, owner, reason` for every trainable parameter."""

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank, counted from its tensors."""

    def save_checkpoint(self, save_dir: str | Path, tag: str, client_state: Mapping[str, Any]) -> None:
        """Write `save_dir/tag/` between two windows; every rank calls it.

        Args:
            save_dir: directory of checkpoints.
            tag: name of this one.
            client_state: JSON of the loop's own, the same on all ranks.
        """

    def load_checkpoint(self, load_dir: str | Path, tag: str) -> dict[str, Any]:
        """Read what any engine's `save_checkpoint` wrote, at any number of ranks; returns the client state."""

    def gathered_state_dict(self, trainable_only: bool = True) -> dict[str, Tensor]:
        """Full parameters by name on the CPU of rank 0 (empty elsewhere); every rank calls it."""

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights that the model computes with, for an evaluation; every rank calls it.

        An engine that steps copies of its own (fp32 masters, ZeRO's partitions) leaves those as they are: a step
        taken afterwards goes on from them.

        Args:
            tensors: full parameters by name, the same on every rank; the others stay.

        Raises:
            RunError: a name or a size that the model does not have.
        """

    def close(self) -> None:
        """Release process groups and hooks."""
