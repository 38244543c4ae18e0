"""What all engines share: windows, the scale of measured gradients, reports, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsso.curvature.layer_blocks import LayerBlocks
from dsso.curvature.masks import TokenMasks
from dsso.engines import portable
from dsso.errors import RunError
from dsso.optim._estimating import Estimate, EstimatingMethod
from dsso.optim._partition import PartitionOptimizer
from dsso.parallel import collectives


class EngineBase:
    """The common part of the engines; see `dsso.engines.protocol.Engine` for the public face.

    Args:
        module: the unwrapped model.
        optimizer: carries the method.
        device: of this rank.
        gradient_accumulation_steps: micro-batches a window.
        micro_batch_size: examples per rank and micro-batch.

    Attributes:
        shapes: full shape of every trainable parameter, by name.
        pending: micro-batches of a window that has not had its step.
        tried: the model is known to be one that can be differentiated twice.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: PartitionOptimizer,
        device: torch.device,
        gradient_accumulation_steps: int,
        micro_batch_size: int,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.device = device
        self.rank = collectives.rank()
        self.world_size = collectives.world_size()
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.micro_batch_size = micro_batch_size
        self.global_steps = 0
        self._window_open = False
        self._sampling = self._estimating = self._unwrapped = False
        self._terms: float | Tensor = 1.0
        self._labels = TokenMasks(module) if optimizer.method is not None else None
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shapes = {n: tuple(p.shape) for n, p in trainable.items()}
        self.pending = 0
        self.tried = False
        self._first = next(iter(trainable.values()))

    # -- to be given by the engine ------------------------------------------------------------------------------

    def _loss_scale(self) -> float:
        return 1.0

    def publish_weights(self) -> None:
        """Make the weights that the model computes with agree with the optimizer's; collective.

        Called when a checkpoint has been read into the optimizer's buffers. Nothing to do where they are the same
        tensors.
        """

    def engine_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the engine itself, as JSON; the same on all ranks."""
        return {}

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `engine_state` returned; empty when another engine wrote the checkpoint."""

    # -- weights, where every rank has all of them; engines that shard have their own --------------------------

    def gathered_state_dict(self, trainable_only: bool = True) -> dict[str, Tensor]:
        """Parameters by name, on the CPU."""
        return {
            n: p.detach().cpu().clone()
            for n, p in self.module.named_parameters()
            if p.requires_grad or not trainable_only
        }

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights; see `dsso.engines.protocol.Engine.load_weights`."""
        parameters = dict(self.module.named_parameters())
        for name, value in self._known(tensors, parameters).items():
            parameters[name].copy_(value)

    # -- windows of estimation ----------------------------------------------------------------------------------

    def wants_estimate(self) -> Estimate | None:
        """The window of estimation that must come before the next one, see `dsso.engines.estimates`."""
        probing = self.optimizer.probing
        return (
            None
            if self._window_open or probing is None
            else probing.method.wants_estimate(self.optimizer.steps)
        )

    @property
    def twice_differentiated(self) -> bool:
        """Whether products with curvature come from double backward passes."""
        method = self.optimizer.method
        return isinstance(method, EstimatingMethod) and method.products == "double_backward"

    @contextmanager
    def displaced(self, sign: float) -> Iterator[None]:
        """Within it the model computes with weights displaced along the method's direction; collective.

        Args:
            sign: to which side.
        """
        assert self.optimizer.probing is not None
        try:
            with self.optimizer.probing.displaced(sign, self.optimizer.steps):
                self._follow_weights()
                yield
        finally:
            self._follow_weights()

    @property
    def displacement(self) -> Tensor:
        """What the method's direction was multiplied by in the last `displaced`, a scalar."""
        assert self.optimizer.probing is not None
        return self.optimizer.probing.method.displacement

    def whole_direction(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters that products with curvature are taken of, and the method's direction in their shapes; collective.

        Raises:
            RunError: no rank has whole parameters.
        """
        self.need_whole_weights()
        assert self.optimizer.probing is not None
        whole = self.optimizer.probing.whole_direction(self.optimizer.steps)
        parameters = {n: p for n, p in self.module.named_parameters() if n in whole}
        return list(parameters.values()), [whole[n].view(p.shape) for n, p in parameters.items()]

    def need_whole_weights(self) -> None:
        """Refuse double backward passes where ranks hold parts of the weights.

        Raises:
            RunError: they do.
        """
        if self.sharded:
            raise RunError(
                f"{self.name} has no whole weights to differentiate twice",
                where="optimizer.params.products",
                got="double_backward",
                remedy="set it to 'difference'",
            )

    @property
    def layer_blocks(self) -> LayerBlocks:
        """What measures the blocks of small layers, where the method has them formed."""
        method = self.optimizer.method
        assert isinstance(method, EstimatingMethod)
        assert method.layer_blocks is not None
        return method.layer_blocks

    @property
    def wants_judgement(self) -> bool:
        """Whether the step that was just taken has to be judged, see `dsso.engines.estimates.judge`."""
        return self.optimizer.trust is not None and self.optimizer.trust.open

    @contextmanager
    def along_the_step(self, share: float | Tensor) -> Iterator[None]:
        """Within it the model computes with weights on the line of the last step; collective.

        Args:
            share: of the step; 0 is where it began.
        """
        assert self.optimizer.trust is not None
        try:
            with self.optimizer.trust.at(share):
                self._follow_weights()
                yield
        finally:
            self._follow_weights()

    @contextmanager
    def unwrapped(self) -> Iterator[None]:
        """Within it a forward pass is the model's own: it belongs to no window, and may be differentiated again."""
        self._unwrapped = True
        try:
            yield
        finally:
            self._unwrapped = False

    def _follow_weights(self) -> None:
        """Make the model compute with the weights that the optimizer's buffers hold now; collective."""
        self.publish_weights()

    @contextmanager
    def estimating(self) -> Iterator[None]:
        """Within it a window ends in an estimate of curvature: nothing moves and no step is counted.

        Raises:
            RunError: in the middle of a window, or left before the window's end.
        """
        if self._window_open:
            raise RunError(
                "an accumulation window is open", where="engine.estimating", remedy="call step first"
            )
        self.optimizer.estimating = self._estimating = True
        try:
            yield
            if self.pending:
                raise RunError(
                    "the window of estimation has no end",
                    where="engine.estimating",
                    got=f"{self.pending} micro-batches",
                    allowed=str(self.gradient_accumulation_steps),
                )
            if self.optimizer.probing is not None:
                self.optimizer.probing.method.had_estimate(self.optimizer.steps)
        finally:
            self.optimizer.estimating = self._estimating = False

    # -- passes -------------------------------------------------------------------------------------------------

    def _before_forward(self) -> None:
        """Open the accumulation window with its first training forward."""
        if self.module.training and torch.is_grad_enabled() and not self._unwrapped:
            self._open()

    def _open(self) -> None:
        if not self._window_open:
            self._window_open = True
            self.optimizer.begin_window()

    def _before_backward(self, terms: float | Tensor | None) -> None:
        self._open()
        self.pending += 1
        method = self.optimizer.method
        if method is None:
            return
        if terms is None and self._labels is not None:
            terms = self._labels.terms()
        if terms is None:
            raise RunError(
                "the number of loss terms is not known",
                where="engine.backward",
                remedy="call engine.backward(loss, terms=n) with the n that the sum of the losses was divided by, "
                "or give the model its labels",
            )
        self._terms = terms
        last = self.pending == self.gradient_accumulation_steps
        method.before_backward(self._scale(terms), terms, last)

    def _scale(self, terms: float | Tensor) -> float | Tensor:
        return terms * (self.gradient_accumulation_steps / self._loss_scale())

    def wants_sampled_pass(self) -> bool:
        """True when this micro-batch must be followed by `sampled_pass`."""
        method = self.optimizer.method
        return method is not None and self._window_open and method.wants_sampled_pass()

    def sampled_pass(self, forward: Callable[[], Tensor]) -> None:
        """Measure output gradients on sampled labels, in a pass of its own that leaves no parameter gradient.

        All parameters are frozen meanwhile, and the embeddings' outputs ask for a gradient in their place: no
        gradient hook of the engine fires, and both kinds of activation checkpointing work.

        Args:
            forward: returns the sum of the losses at sampled labels over `terms`, see `dsso.curvature.labels`.
        """
        method = self.optimizer.method
        assert method is not None
        scale = self._loss_scale()
        self._sampling = True
        try:
            with self._frozen(), method.sampled_pass():
                loss = forward()
                # No accumulation divides this loss, but in fp16 it needs the loss scale as any other.
                method.before_backward(self._terms / scale, 0.0)
                (loss.float() * scale).backward()  # type: ignore[no-untyped-call]
        finally:
            self._sampling = False

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        # Reentrant checkpointing builds a graph only where an input of the block asks for a gradient.
        handles = [
            module.register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
            for module in self.module.modules()
            if isinstance(module, nn.Embedding)
        ]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _after_step(self) -> None:
        self._window_open = False
        self.pending = 0
        self.global_steps += not self._estimating

    # -- reports ------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Any:
        """Put the model in training mode."""
        return self.module.train(mode)

    def eval(self) -> Any:
        """Put the model in evaluation mode."""
        return self.module.eval()

    def lr(self) -> float:
        """Learning rate that the next step uses."""
        return float(self.optimizer.param_groups[0]["lr"])

    def health(self) -> dict[str, float]:
        """Figures about the last step; synchronizes with the device."""
        figures = self.optimizer.health()
        figures["loss_scale"] = self._loss_scale()
        return figures

    def publish_figures(self, figures: Mapping[str, Any]) -> None:
        """Hand the figures of a logged step to what else keeps them; nothing does but DeepSpeed's monitors.

        Args:
            figures: by name; those that are no number are left out.
        """

    @property
    def stage(self) -> int | None:
        """ZeRO stage, where there are stages."""
        return None

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of the weights only."""
        return self.stage == 3

    @property
    def name(self) -> str:
        """Name of the engine, as a recipe writes it."""
        return type(self).__name__.removesuffix("Engine").lower()

    @property
    def dtype(self) -> str:
        """Number format of the weights that the model computes with."""
        return str(self._first.dtype).removeprefix("torch.")

    def table(self) -> list[dict[str, Any]]:
        """Rows `parameter, shape, method, owner, reason` for every trainable parameter."""
        method = self.optimizer.method
        owners = {} if method is None else method.owners
        taken = {*owners, *(() if method is None else method.taken)}
        reasons = {} if method is None else method.rest
        name = "" if method is None else type(method).__module__.rsplit(".", 1)[-1].upper()
        return [
            {
                "parameter": parameter,
                "shape": shape,
                "method": name if parameter in taken else self.optimizer.rules[parameter].name,
                "owner": owners.get(parameter),
                "reason": reasons.get(parameter, ""),
            }
            for parameter, shape in self.shapes.items()
        ]

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        return self.optimizer.state_bytes()

    @staticmethod
    def _known(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors, when all of them are weights of the model.

        Raises:
            RunError: one of them has no counterpart, or another number of elements.
        """
        for name, value in tensors.items():
            if name not in weights:
                raise RunError("the model has no such parameter", where="engine.load_weights", got=name)
            # Under ZeRO stage 3 the parameter itself is empty.
            wanted = getattr(weights[name], "ds_numel", weights[name].numel())
            if value.numel() != wanted:
                raise RunError(
                    f"the parameter {name} has another size",
                    where="engine.load_weights",
                    got=value.numel(),
                    allowed=str(wanted),
                )
        return dict(tensors)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save_checkpoint(self, save_dir: str | Path, tag: str, client_state: Mapping[str, Any]) -> None:
        """Write `save_dir/tag/`; collective. Any engine can read it, at any number of ranks."""
        portable.write(self, Path(save_dir) / tag, client_state)

    def load_checkpoint(self, load_dir: str | Path, tag: str) -> dict[str, Any]:
        """Read what any engine's `save_checkpoint` wrote; collective. Returns the client state."""
        return portable.read(self, Path(load_dir) / tag)

    def _close_hooks(self) -> None:
        if self.optimizer.method is not None:
            self.optimizer.method.close()
        if self._labels is not None:
            self._labels.remove()
