"""What all engines share: windows, the scale of measured gradients, reports, dsso's part of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsso.curvature.masks import TokenMasks
from dsso.errors import RunError
from dsso.optim._partition import PartitionOptimizer
from dsso.parallel import collectives

STATE_DIRECTORY = "dsso"
"""Folder of a checkpoint that holds the method's state, one file a rank, keyed by layer name."""


class EngineBase:
    """The common part of the engines; see `dsso.engines.protocol.Engine` for the public face.

    Args:
        module: the unwrapped model.
        optimizer: carries the method.
        device: of this rank.
        gradient_accumulation_steps: micro-batches a window.
        micro_batch_size: examples per rank and micro-batch.
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
        self._sampling = False
        self._terms: float | Tensor = 1.0
        self._labels = TokenMasks(module) if optimizer.method is not None else None
        self._shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}

    # -- to be given by the engine ------------------------------------------------------------------------------

    def _loss_scale(self) -> float:
        return 1.0

    # -- passes -------------------------------------------------------------------------------------------------

    def _before_forward(self) -> None:
        """Open the accumulation window with its first training forward."""
        if self.module.training and torch.is_grad_enabled() and not self._window_open:
            self._window_open = True
            self.optimizer.begin_window()

    def _before_backward(self, terms: float | Tensor | None) -> None:
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
        method.before_backward(self._scale(terms), terms)

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
        self.global_steps += 1

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

    def table(self) -> list[dict[str, Any]]:
        """Rows `parameter, shape, method, owner, reason` for every trainable parameter."""
        method = self.optimizer.method
        owners = {} if method is None else method.owners
        reasons = {} if method is None else method.rest
        name = "" if method is None else type(method).__module__.rsplit(".", 1)[-1].upper()
        return [
            {
                "parameter": parameter,
                "shape": shape,
                "method": name if parameter in owners else self.optimizer.rules[parameter].name,
                "owner": owners.get(parameter),
                "reason": reasons.get(parameter, ""),
            }
            for parameter, shape in self._shapes.items()
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

    def _save_method(self, directory: Path) -> None:
        """Write this rank's part of the method's state, by layer name."""
        folder = directory / STATE_DIRECTORY
        folder.mkdir(parents=True, exist_ok=True)
        method = self.optimizer.method
        tensors = {} if method is None else method.state_tensors()
        problem: Exception | None = None
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                folder / f"method_rank{self.rank:05d}.safetensors",
            )
            text = json.dumps(self.optimizer.extra_state())
            (folder / f"counters_rank{self.rank:05d}.json").write_text(text, encoding="utf-8")
        except Exception as error:  # a full disk: the other ranks wait below
            problem = error
        collectives.barrier()
        if problem is not None:
            raise problem

    def _load_method(self, directory: Path) -> None:
        """Read back the layers that this rank owns now, whichever rank wrote them."""
        folder = directory / STATE_DIRECTORY
        files = sorted(folder.glob("method_rank*.safetensors"))
        counters = sorted(folder.glob("counters_rank*.json"))
        if not files or not counters:
            raise RunError("the checkpoint holds no state of the method", where=str(folder))
        mine = counters[self.rank] if self.rank < len(counters) else counters[0]
        method = self.optimizer.method
        if method is not None:
            wanted = set(method.state_tensors())
            found: dict[str, Tensor] = {}
            for file in files:
                with safe_open(file, framework="pt", device="cpu") as archive:
                    for name in wanted & set(archive.keys()):
                        found[name] = archive.get_tensor(name)
            method.load_state_tensors(found)
        state: Mapping[str, Any] = json.loads(mine.read_text(encoding="utf-8"))
        self.optimizer.load_extra_state(state)

    def _close_hooks(self) -> None:
        if self.optimizer.method is not None:
            self.optimizer.method.close()
        if self._labels is not None:
            self._labels.remove()
