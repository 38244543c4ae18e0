"""DeepSpeed ZeRO-0/1/2/3: dsso as the client optimizer on DeepSpeed's own flat partitions.

DeepSpeed reduces, averages, unscales and overflow-checks the gradients and gathers the weights; dsso's optimizer is
stepped once per accumulation window on the fp32 partition, whose layout is read once, here, and verified against
the model before the first step.

Where the partition is:

- stage 0, fp32: the parameters; bf16: fp32 copies of them, one each
- stages 1, 2 (and stage 1 with bf16 weights and fp32 accumulation): a slice of one flat buffer, which may cut a
  parameter anywhere: `_hp_mapping` of each parameter
- stage 3: an equal slice of every parameter, the last one padded
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines import zero3
from dsso.engines.base import EngineBase
from dsso.engines.build_lock import remove_stale_lock
from dsso.engines.quiet import quiet
from dsso.errors import RecipeError, RunError
from dsso.optim._partition import PartitionOptimizer
from dsso.parallel import collectives
from dsso.parallel.fragments import Span

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's dynamic loss scaler."""


def release_shared_memory(device: torch.device) -> None:
    """Take the names off the shared memory of DeepSpeed's collectives on the CPU; collective.

    DeepSpeed does so only in a clean tear-down, so every run that ends otherwise leaves 69 MB a rank in `/dev/shm`
    until the machine is restarted. Once all ranks have opened the memory, nobody needs the name.
    """
    if device.type != "cpu":
        return
    collectives.barrier()
    place = f"{os.getuid()}_{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    rank = os.environ.get("LOCAL_RANK", "0")
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{place}_{rank}"):
        path.unlink(missing_ok=True)


class DeepSpeedEngine(EngineBase):
    """A `deepspeed.DeepSpeedEngine` with a second-order step; what is not defined here is DeepSpeed's own.

    Args:
        module: the model, its `requires_grad` flags set.
        optimizer: carries the method; it is attached here.
        device: of this rank.
        ds_config: a configuration that DeepSpeed can parse, without an optimizer section.

    Raises:
        RunError: when DeepSpeed's partition is not what dsso reads it to be.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: PartitionOptimizer,
        device: torch.device,
        ds_config: Mapping[str, Any],
    ) -> None:
        quiet()
        import deepspeed  # heavy, and not needed by the other engines
        from deepspeed.accelerator import get_accelerator

        config = dict(ds_config)
        if config.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
            raise RecipeError(
                "DeepSpeed does not support fp16 on this device",
                where="fp16.enabled",
                got=str(device),
                remedy="use bf16 or fp32",
            )
        names = {id(p): n for n, p in module.named_parameters() if p.requires_grad}
        sizes = {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}
        super().__init__(
            module,
            optimizer,
            device,
            int(config["gradient_accumulation_steps"]),
            int(config["train_micro_batch_size_per_gpu"]),
        )
        optimizer.dry_run = True
        if device.type == "cpu":
            remove_stale_lock("deepspeed_shm_comm")
        ds, _, _, self.scheduler = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        optimizer.dry_run = False
        self._take(ds, names, sizes)

    def _take(self, ds: Any, names: Mapping[int, str], sizes: Mapping[str, int]) -> None:
        """Attach the optimizer to the partitions of DeepSpeed's engine; collective.

        Args:
            ds: the engine, made with the optimizer.
            names: of the trained parameters, by identity.
            sizes: elements of each, in model order.

        Raises:
            RunError: the partition is not what dsso reads it to be.
        """
        self._ds = ds
        release_shared_memory(self.device)
        self._names = names
        self._dropped = 0
        buffers, spans = self._layout()
        self._verify(buffers, spans)
        try:
            self.optimizer.attach(buffers, spans, sizes)
        except ValueError as error:
            raise RunError(
                f"DeepSpeed's partition cannot be read: {error}",
                where=f"zero_optimization.stage {self.stage}",
                remedy="use a DeepSpeed version that dsso is tested with",
            ) from error

    def __getattr__(self, name: str) -> Any:
        if name == "_ds":
            raise AttributeError(name)
        return getattr(self._ds, name)

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return int(self._ds.zero_optimization_stage())

    # -- layout -------------------------------------------------------------------------------------------------

    def _layout(self) -> tuple[list[Tensor], list[Span]]:
        """Flat fp32 buffers of this rank, and what lies where in them."""
        zero = self._ds.optimizer
        if self.stage == 3:
            return self._layout_stage_3(zero)
        for flat, groups in (
            ("single_partition_of_fp32_groups", "bit16_groups"),
            ("fp32_groups_flat_partition", "bf16_groups"),
        ):
            if hasattr(zero, flat):
                return self._layout_flat(list(getattr(zero, flat)), getattr(zero, groups))
        if hasattr(zero, "fp32_groups"):
            copies = [p for group in zero.fp32_groups for p in group]
            models = [p for group in zero.fp16_groups for p in group]
        else:
            copies = models = list(zero.param_groups[0]["params"])
        spans = [Span(self._names[id(p)], 0, p.numel(), i, 0) for i, p in enumerate(models)]
        return copies, spans

    def _layout_flat(self, buffers: list[Tensor], groups: Any) -> tuple[list[Tensor], list[Span]]:
        if len(buffers) != 1:
            raise RunError(
                f"DeepSpeed made {len(buffers)} parameter groups, a global Newton step needs one",
                where=f"zero_optimization.stage {self.stage}",
            )
        spans = []
        for parameter in groups[0]:
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                spans.append(Span(self._names[id(parameter)], inside.start, inside.numel, 0, flat.start))
        return buffers, spans

    def _layout_stage_3(self, zero: Any) -> tuple[list[Tensor], list[Span]]:
        if len(zero.fp16_groups) != 1:
            raise RunError(
                f"DeepSpeed made {len(zero.fp16_groups)} sub-groups, a global Newton step needs one",
                where="zero_optimization.sub_group_size",
                remedy="leave sub_group_size out of the recipe",
            )
        spans = []
        offset = 0
        for parameter in zero.fp16_groups[0]:
            start, numel = zero3.piece(parameter, self.rank)
            spans.append(Span(self._names[id(parameter)], start, numel, 0, offset))
            offset += int(parameter.partition_numel())
        return list(zero.fp32_partitioned_groups_flat), spans

    def _verify(self, buffers: list[Tensor], spans: list[Span]) -> None:
        """Compare every piece of the partition with the model's weights; all ranks fail together."""
        parameters = {self._names[id(p)]: p for p in self.module.parameters() if id(p) in self._names}
        wrong = ""
        for span in spans:
            parameter = parameters[span.name]
            if self.stage == 3:
                model = parameter.ds_tensor.view(-1)[: span.numel]  # type: ignore[attr-defined]
            else:
                model = parameter.detach().reshape(-1)[span.start : span.start + span.numel]
            held = buffers[span.buffer].detach().view(-1)[span.offset : span.offset + span.numel]
            if not torch.equal(held.to(model.dtype), model.to(held.device)):
                wrong = span.name
                break
        found = collectives.first_named(wrong)
        if found:
            raise RunError(
                "DeepSpeed's partition does not hold the weights where its own tables say",
                where=f"zero_optimization.stage {self.stage}, parameter {found}",
                remedy="leave round_robin_gradients off, and use a DeepSpeed version that dsso is tested with",
            )

    # -- passes -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass through DeepSpeed."""
        self._before_forward()
        if self._sampling or self._unwrapped:
            # DeepSpeed's own forward prepares a backward pass that ends in a reduction of gradients.
            return self.module(*args, **kwargs)
        return self._ds(*args, **kwargs)

    def _loss_scale(self) -> float:
        if not self._ds.fp16_enabled():
            return 1.0
        zero = self._ds.optimizer
        return float(zero.cur_scale if hasattr(zero, "cur_scale") else zero.loss_scale)

    def backward(self, loss: Tensor, terms: float | Tensor | None = None) -> None:
        """Backward pass of one micro-batch through DeepSpeed."""
        self._before_backward(terms)
        self._ds.backward(loss)

    def is_gradient_accumulation_boundary(self) -> bool:
        """True when the next `step()` updates the parameters."""
        return bool(self._ds.is_gradient_accumulation_boundary())

    def step(self) -> None:
        """Optimizer step at the end of a window, else nothing."""
        boundary = self.is_gradient_accumulation_boundary()
        taken = self.optimizer.steps
        if self._estimating:
            self._end_estimate(boundary)
            return
        self._ds.step()
        if boundary:
            # DeepSpeed may have dropped the step (overflow, or a norm that is not finite) before ours was asked.
            self._dropped = self._dropped + 1 if self.optimizer.steps == taken else 0
            self._after_step()

    def _end_estimate(self, boundary: bool) -> None:
        """DeepSpeed's step without what counts it: to DeepSpeed, the window was one like any other."""
        ds = self._ds
        counted = ds.global_steps, ds.global_samples, ds.lr_scheduler
        ds.lr_scheduler = None
        try:
            ds.step()
        finally:
            ds.global_steps, ds.global_samples, ds.lr_scheduler = counted
        if boundary:
            self._after_step()

    def train(self, mode: bool = True) -> Any:
        """Put the model in training mode."""
        return self._ds.train(mode)

    def eval(self) -> Any:
        """Put the model in evaluation mode."""
        return self._ds.eval()

    def health(self) -> dict[str, float]:
        """Figures about the last step, with the steps that DeepSpeed itself dropped."""
        figures = super().health()
        figures["consecutive_skips"] = figures.get("consecutive_skips", 0.0) + self._dropped
        figures["skipped_steps"] = figures.get("skipped_steps", 0.0) + float(self._ds.skipped_steps)
        return figures

    def publish_figures(self, figures: Mapping[str, Any]) -> None:
        """Add the figures of a logged step to those that DeepSpeed's monitors write themselves.

        Args:
            figures: by name; those that are no number are left out.
        """
        if self._ds.monitor.enabled and self.rank == 0:
            # The names and the abscissa, examples seen, are DeepSpeed's.
            at = self._ds.global_samples
            numbers = {k: v for k, v in figures.items() if isinstance(v, int | float)}
            self._ds.monitor.write_events([(f"Train/Samples/{name}", v, at) for name, v in numbers.items()])

    # -- checkpoints --------------------------------------------------------------------------------------------

    def publish_weights(self) -> None:
        """Let DeepSpeed make the working weights from the master weights, as after a step, and compare them."""
        self._follow_weights()
        self._verify(*self._layout())

    def _follow_weights(self) -> None:
        zero = self._ds.optimizer
        if self.stage == 3:
            zero.checkpoint_event_prologue()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups"):
            for copies, models in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
                for copy, model in zip(copies, models, strict=True):
                    model.data.copy_(copy.data)

    def engine_state(self) -> dict[str, Any]:
        """Steps that DeepSpeed dropped, and its loss scale."""
        state: dict[str, Any] = {"skipped_steps": int(self._ds.skipped_steps), "dropped": self._dropped}
        scaler = self._dynamic_scaler()
        if scaler is not None:
            state["loss_scaler"] = {name: getattr(scaler, name) for name in _SCALER}
        return state

    def _dynamic_scaler(self) -> Any:
        scaler = getattr(self._ds.optimizer, "loss_scaler", None) if self._ds.fp16_enabled() else None
        return scaler if getattr(scaler, "dynamic", False) else None

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        """Take over counters and loss scale; a static scale stays that of the recipe."""
        ds = self._ds
        ds.global_steps = self.global_steps
        # Checkpoints are written between windows, so the number of micro-batches follows from that of steps.
        ds.micro_steps = self.global_steps * self.gradient_accumulation_steps
        ds.global_samples = self.global_steps * ds.train_batch_size()
        ds.skipped_steps = int(state.get("skipped_steps", 0))
        self._dropped = int(state.get("dropped", 0))
        scaler = self._dynamic_scaler()
        if scaler is not None:
            for name, value in state.get("loss_scaler", {}).items():
                setattr(scaler, name, value)

    def gathered_state_dict(self, trainable_only: bool = True) -> dict[str, Tensor]:
        """Full parameters by name on the CPU of rank 0, empty elsewhere; collective."""
        return zero3.state_dict(self.module, trainable_only, self.rank)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights; see `dsso.engines.protocol.Engine.load_weights`."""
        zero3.load(self.module, self._known(tensors, dict(self.module.named_parameters())))

    def close(self) -> None:
        """Take the hooks off the model and let DeepSpeed release what it holds."""
        from deepspeed import comm

        if comm.comm.comms_logger.enabled:
            comm.log_summary()
        self._close_hooks()
        self._ds.destroy()
