"""One device, no launcher, no process group: for debugging, and the reference of every other engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsso.engines.base import EngineBase
from dsso.errors import RunError
from dsso.optim._partition import PartitionOptimizer
from dsso.parallel.fragments import Span


class SingleEngine(EngineBase):
    """Runs a model in one process.

    Weights below fp32 get an fp32 master copy, which is what the optimizer steps.

    Args:
        module: the model, on its device already.
        optimizer: carries the method; it is attached here.
        device: where the model lives.
        gradient_accumulation_steps, micro_batch_size: of the recipe.
        scheduler: learning-rate scheduler on the optimizer, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: PartitionOptimizer,
        device: torch.device,
        gradient_accumulation_steps: int,
        micro_batch_size: int,
        scheduler: Any = None,
    ) -> None:
        super().__init__(module, optimizer, device, gradient_accumulation_steps, micro_batch_size)
        self.scheduler = scheduler
        self._micro = 0
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._masters = {
            n: p if p.dtype in (torch.float32, torch.float64) else p.detach().to(torch.float32).clone()
            for n, p in self._parameters.items()
        }
        for p in self._parameters.values():
            if not p.is_contiguous():
                p.data = p.data.contiguous()
        spans = [Span(n, 0, p.numel(), i, 0) for i, (n, p) in enumerate(self._parameters.items())]
        optimizer.attach(
            list(self._masters.values()), spans, {n: p.numel() for n, p in self._parameters.items()}
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass."""
        self._before_forward()
        return self.module(*args, **kwargs)

    def is_gradient_accumulation_boundary(self) -> bool:
        """True when the next `step()` updates the parameters."""
        return self._micro >= self.gradient_accumulation_steps

    def backward(self, loss: Tensor, terms: float | Tensor | None = None) -> None:
        """Backward pass of one micro-batch; its gradient enters the window with weight 1/steps."""
        self._before_backward(terms)
        (loss / self.gradient_accumulation_steps).backward()  # type: ignore[no-untyped-call]
        self._accumulate()
        self._micro += 1

    def _accumulate(self) -> None:
        """Sum the gradients of weights below fp32 over the window in fp32."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(torch.float32)
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def _complete_gradients(self) -> None:
        """Make the gradients of the masters those of the global batch; one process has them already."""

    def step(self) -> None:
        """Optimizer step at the end of a window, else nothing."""
        if not self.is_gradient_accumulation_boundary():
            return
        self._complete_gradients()
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])
                    self._masters[name].grad = None
                parameter.grad = None
        if self.scheduler is not None:
            self.scheduler.step()
        self._micro = 0
        self._after_step()

    def save_checkpoint(self, save_dir: str | Path, tag: str, client_state: Mapping[str, Any]) -> None:
        """Write `save_dir/tag/`."""
        directory = Path(save_dir) / tag
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"parameter/{n}": m.detach().cpu().clone() for n, m in self._masters.items()}
        for name, master in self._masters.items():
            for key, value in self.optimizer.state[master].items():
                tensors[f"{key}/{name}"] = value.detach().cpu().clone()
        save_file(tensors, directory / "single.safetensors")
        torch.save(
            {
                "client_state": dict(client_state),
                "global_steps": self.global_steps,
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "lr": self.lr(),
            },
            directory / "single.pt",
        )
        self._save_method(directory)

    def load_checkpoint(self, load_dir: str | Path, tag: str) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote; returns the client state."""
        directory = Path(load_dir) / tag
        file = directory / "single.safetensors"
        if not file.exists():
            raise RunError(
                "the checkpoint was not written by the single-device engine",
                where=str(directory),
                remedy="resume with the engine that wrote it",
            )
        with safe_open(file, framework="pt", device="cpu") as archive, torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(archive.get_tensor(f"parameter/{name}"))
                if master is not self._parameters[name]:
                    self._parameters[name].copy_(master)
                for key, value in self.optimizer.state[master].items():
                    value.copy_(archive.get_tensor(f"{key}/{name}"))
        state = torch.load(directory / "single.pt", weights_only=False)
        self.global_steps = int(state["global_steps"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.optimizer.param_groups[0]["lr"] = state["lr"]
        self._load_method(directory)
        client: dict[str, Any] = state["client_state"]
        return client

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

    def close(self) -> None:
        """Take the hooks off the model."""
        self._close_hooks()
