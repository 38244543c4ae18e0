"""From a model and a resolved recipe to an engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dsso.clip import NormQuantile
from dsso.engines.base import EngineBase
from dsso.engines.ddp import DDPEngine
from dsso.engines.deepspeed import DeepSpeedEngine
from dsso.engines.environment import bound_waits, launch_environment
from dsso.engines.forward import ForwardEngine
from dsso.engines.launchers import Environment
from dsso.engines.quiet import quiet
from dsso.engines.single import SingleEngine
from dsso.errors import RecipeError
from dsso.optim import available, is_forward, resolve
from dsso.optim._partition import Clipping, PartitionOptimizer, Warmup
from dsso.optim._probes import ForwardOptimizer
from dsso.optim._rules import Rule
from dsso.optim._trust import Trust
from dsso.parallel import collectives

_NAMES = {"deepspeed": "DeepSpeed", "fsdp2": "FSDP2", "ddp": "DDP"}


def make_optimizer(
    model: nn.Module,
    kind: str,
    config: Any,
    device: torch.device,
    clip: float = 0.0,
    example: Mapping[str, Any] | None = None,
    carrier: type[PartitionOptimizer] = PartitionOptimizer,
) -> PartitionOptimizer:
    """The optimizer of a recipe, not attached to an engine yet.

    Args:
        model: the unwrapped model.
        kind: `optimizer.type`.
        config: its validated parameters.
        device: where the method's state lives.
        clip: largest gradient norm for baselines; 0: none.
        example: keyword arguments of a small forward pass, from which K-FAC learns which layers read the same tensor;
            None: made up for a Hugging Face model.
        carrier: class of the optimizer.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise RecipeError("no parameter of the model is trainable", where="dsso.peft")
    parameters = [p for _, p in trainable]
    if kind.upper() in available():
        method = resolve(kind).Method(
            config, model, device, collectives.rank(), collectives.world_size(), example
        )
        adaptive = config.adaptive_tau and NormQuantile(**config.adaptive_tau.model_dump())
        clipping = Clipping(config.clip, config.tau, config.kl_clip, adaptive)
        warmup = Warmup(config.warmup_steps, config.warmup_scale)
        trust = config.adaptive_damping and Trust(**config.adaptive_damping.model_dump())
        return carrier(parameters, config.lr, method.rules(), method, clipping, warmup, trust)
    clipping = Clipping("pre", clip) if clip > 0 else Clipping()
    rules = {n: _baseline_rule(kind, config, p.dim() > 1) for n, p in trainable}
    return carrier(parameters, config.lr, rules, None, clipping)


def make_forward_optimizer(model: nn.Module, kind: str, config: Any) -> ForwardOptimizer:
    """The optimizer of a recipe whose method needs only losses, not attached to an engine yet.

    Args:
        model: the unwrapped model.
        kind: `optimizer.type`.
        config: its validated parameters.

    Raises:
        RecipeError: nothing is trained.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise RecipeError("no parameter of the model is trainable", where="dsso.peft")
    return ForwardOptimizer(trainable, config.lr, resolve(kind).Method(config), kind.lower())


def _baseline_rule(kind: str, config: Any, is_matrix: bool) -> Rule:
    """AdamW, Adam or SGD; biases and norms are not decayed."""
    decay = config.weight_decay if is_matrix else 0.0
    if kind.lower() == "sgd":
        return Rule("sgd", 1.0, decay, config.momentum, config.nesterov, coupled=True)
    coupled = kind.lower() == "adam" and not config.adam_w_mode
    return Rule("adamw", 1.0, decay, coupled=coupled, betas=config.betas, eps=config.eps)


def _scheduler(optimizer: torch.optim.Optimizer, section: dict[str, Any] | None) -> Any:
    """DeepSpeed's own scheduler classes, so that a recipe means the same without DeepSpeed's engine."""
    if not section:
        return None
    quiet()
    from deepspeed.runtime import lr_schedules

    return getattr(lr_schedules, section["type"])(optimizer, **section.get("params", {}))


def build(
    model: nn.Module,
    resolved: Any,
    environment: Environment | None = None,
    example: Mapping[str, Any] | None = None,
) -> EngineBase:
    """The engine that a resolved recipe asks for; collective under a launcher.

    Without a launcher any recipe runs on one device in this process: by the invariance of the step the result is the
    same. All process groups get the recipe's time-out.

    Args:
        model: the model, with its adapters and `requires_grad` flags.
        resolved: from `dsso.recipe`.
        environment: from `launch_environment`; read anew when None.
        example: see `make_optimizer`.

    Raises:
        RecipeError: for an engine, precision or model that cannot work.
    """
    engine = _build(model, resolved, environment or launch_environment(), example)
    bound_waits(resolved.dsso.train.timeout_minutes)
    return engine


def _build(
    model: nn.Module, resolved: Any, environment: Environment, example: Mapping[str, Any] | None
) -> EngineBase:
    device = environment.device
    ds_config = dict(resolved.ds_config)
    clip = float(ds_config.get("gradient_clipping", 0.0))
    # Clipping is done once, by dsso's own reduction.
    ds_config["gradient_clipping"] = 0.0
    ds_config["zero_allow_untested_optimizer"] = True
    engine = _engine(resolved, environment)
    if environment.rank == 0 and engine == resolved.dsso.engine:
        for note in resolved.notes:
            sys.stderr.write(f"note: {note}\n")
    bf16 = bool(ds_config.get("bf16", {}).get("enabled"))
    if resolved.precision.dtype != "float32":
        # Every engine rounds the weights anyway. Before the method looks at the model, because an adapter that was
        # made in fp32 reads a cast copy, and its layers would not be seen to read one tensor.
        model.to(resolved.precision.torch_dtype)
    if is_forward(resolved.optimizer_type):
        return _build_forward(model, resolved, device, engine, ds_config)
    if engine in ("single", "ddp"):
        model.to(device)
    optimizer = make_optimizer(
        model, resolved.optimizer_type, resolved.optimizer_config, device, clip, example
    )
    if engine == "deepspeed":
        return DeepSpeedEngine(model, optimizer, device, ds_config)
    scheduler = _scheduler(optimizer, ds_config.get("scheduler"))
    if engine == "fsdp2":
        # Not before it is asked for: the import is not free.
        from dsso.engines.fsdp2 import FSDP2Engine

        dtype = torch.bfloat16 if bf16 else torch.float32
        return FSDP2Engine(model, optimizer, device, resolved.gas, resolved.micro_batch, scheduler, dtype)
    kind = DDPEngine if engine == "ddp" else SingleEngine
    return kind(model, optimizer, device, resolved.gas, resolved.micro_batch, scheduler)


def _build_forward(
    model: nn.Module, resolved: Any, device: torch.device, engine: str, ds_config: Mapping[str, Any]
) -> ForwardEngine:
    """The engine of a method that needs only losses."""
    carrier = make_forward_optimizer(model, resolved.optimizer_type, resolved.optimizer_config)
    scheduler = _scheduler(carrier, ds_config.get("scheduler"))
    sizes = (resolved.gas, resolved.micro_batch)
    # The sharded ones are not imported before they are asked for: it is not free.
    if engine == "fsdp2":
        from dsso.engines.forward_rows import ForwardFSDP2Engine

        return ForwardFSDP2Engine(model, carrier, device, *sizes, scheduler)
    stage = resolved.zero_stage if engine == "deepspeed" else None
    if stage == 3:
        from dsso.engines.forward_zero3 import ForwardZero3Engine

        return ForwardZero3Engine(model, carrier, device, ds_config, scheduler)
    return ForwardEngine(model.to(device), carrier, device, *sizes, scheduler, stage)


def _engine(resolved: Any, environment: Environment) -> str:
    """Name of the engine to build: without a launcher it is `single`, whatever the recipe says."""
    asked: str = resolved.dsso.engine
    if asked == "single" and environment.world_size > 1:
        raise RecipeError(
            "the single engine runs one process",
            where="dsso.engine",
            got=f"{environment.world_size} processes",
            remedy="set dsso.engine to deepspeed, fsdp2 or ddp, or start without a launcher",
        )
    engine = "single" if environment.launcher == "none" else asked
    scaled = resolved.ds_config.get("fp16", {}).get("enabled") and not is_forward(resolved.optimizer_type)
    if engine != "deepspeed" and scaled:
        raise RecipeError(
            "fp16 needs DeepSpeed's loss scaling",
            where="fp16.enabled",
            remedy="start through deepspeed (also with one process), or use bf16 or fp32",
        )
    if engine != asked:
        sys.stderr.write(f"no launcher: one device, without {_NAMES[asked]}\n")
    return engine
