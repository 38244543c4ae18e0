"""The cases of the invariance table, and running one of them on any engine."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsso import tasks
from dsso.config import ModelConfig, PeftConfig, TaskConfig
from dsso.engines import estimates, make_optimizer
from dsso.engines.ddp import DDPEngine
from dsso.engines.deepspeed import DeepSpeedEngine
from dsso.engines.fsdp2 import FSDP2Engine
from dsso.engines.single import SingleEngine
from dsso.optim import available, is_forward, resolve
from dsso.optim.kfac import BaseConfig, Config

STEPS = 5
OTHERS = tuple(name for name in available() if name != "KFAC" and not is_forward(name))
"""Methods on gradients beside K-FAC, as they are found."""
CPU = torch.device("cpu")
ENGINES = ("zero-0", "zero-1", "zero-2", "zero-3", "fsdp2", "ddp")
OWN_LAYOUT = ("fsdp2", "ddp")
# name: (model, parameter-efficient tuning, head)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-lora": ("tiny-t5", {"type": "lora", "r": 4, "alpha": 8.0}),
    "roberta-full": ("tiny-roberta", {"type": "none"}),
    "llama-full": ("tiny-llama", {"type": "none"}),
    "bert-adapter": ("tiny-bert", {"type": "adapter", "bottleneck": 8}),
}
ONE_TERM = ("roberta-full", "bert-adapter")
"""Of those the ones with one loss term an example."""
SHAPING = ("low_rank", "low_rank_above", "low_rank_energy", "block_side", "token_stride", "async_delay", "stagger",
           "adaptive_tau", "warmup_steps", "adaptive_damping")
"""Settings that the step itself depends on."""
CHECKPOINTING = ("none", "reentrant", "non_reentrant")


VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    # Buckets that cut every factor, one number at a time in the worst place.
    "odd-buckets": {"bucket_mb": 37 * 4e-6, "overlap": True},
    "no-overlap": {"overlap": False, "bucket_mb": 0.003},
    "at-owners": {"accumulate": "owner", "bucket_mb": 0.002},
    "at-once": {"stagger": False},
    "not-shared": {"share_inputs": "off", "stagger": False},
    "low-rank": {"low_rank": 8, "low_rank_above": 16},
    "energy": {"low_rank": 8, "low_rank_above": 16, "low_rank_energy": 0.8},
    "blocks": {"block_side": 23},
    "stride": {"token_stride": 3},
    "delayed": {"async_delay": 2},
    "inverses": {"apply": "inverse", "strategy": "hybrid_optimal", "block_side": 23},
    "communication": {"strategy": "communication_optimal"},
    "hybrid": {"strategy": "hybrid_optimal", "grad_worker_fraction": 0.67},
    "adaptive": {"adaptive_tau": {"window": 2, "quantile": 0.5}, "warmup_steps": 2},
    "trust": {"adaptive_damping": {"interval": 2, "rate": 0.5}},
    "mixture": {
        "low_rank": 6,
        "low_rank_above": 24,
        "block_side": 33,
        "token_stride": 2,
        "async_delay": 1,
        "strategy": "communication_optimal",
        "bucket_mb": 101 * 4e-6,
    },
}
"""Settings of K-FAC: some change the step, but none may depend on how it is computed. Statistics on the wire in bf16
are not among them: their sums are rounded rank by rank."""

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "GAUSS_NEWTON": {
        "double": {"products": "double_backward"},
        "sampled": {"curvature": "sampled"},
        "sampled-double": {"curvature": "sampled", "products": "double_backward"},
        "preconditioned": {"block_parameters": 1200, "iterations": 2, "damping": 0.01},
    },
    "PSGD": {
        "newton": {"form": "newton"},
        "newton-double": {"form": "newton", "products": "double_backward"},
    },
    "SOPHIA": {
        "hutchinson": {"estimator": "hutchinson"},
        "hutchinson-double": {"estimator": "hutchinson", "products": "double_backward"},
    },
}
"""Settings of other methods that change the step."""


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    model: str
    engine: str
    world_size: int
    gas: int
    checkpointing: str
    padded: bool
    dtype: str = "float32"
    fisher: str = "empirical"
    variant: str = ""
    method: str = "KFAC"

    @property
    def batch(self) -> int:
        """Examples of a global batch; three ranks cannot share 16."""
        return 24 if self.world_size == 3 else 16

    @property
    def reference(self) -> tuple[str, bool, str, str, int, str]:
        """What the single-process reference depends on."""
        # How statistics travel and who applies them is no setting of a single process.
        given = self.settings
        shape = {key: given[key] for key in given if key in SHAPING or self.method != "KFAC"}
        return (self.model, self.padded, self.fisher, self.dtype, self.batch, f"{self.method} {shape!r}")

    @property
    def settings(self) -> dict[str, Any]:
        """Of the variant."""
        if self.method == "KFAC":
            return VARIANTS[self.variant]
        return OPTIONS[self.method][self.variant] if self.variant else {}

    def __str__(self) -> str:
        fill = "padded" if self.padded else "full"
        return (
            f"{self.model:13s} {self.engine:6s} W={self.world_size} gas={self.gas} {self.checkpointing:13s} {fill:6s}"
            f" {self.dtype} {self.fisher if self.method == 'KFAC' else self.method} {self.variant}".rstrip()
        )


def all_cases(world_size: int) -> Iterator[Case]:
    """The whole matrix at 1 and 2 ranks; at more a slice of it, all engines and models."""
    if world_size <= 2:
        axes = itertools.product(MODELS, ENGINES, (1, 4), CHECKPOINTING, (True, False))
    else:
        gas = (1, 2) if world_size == 8 else (1, 4)
        axes = itertools.product(MODELS, ENGINES, gas, ("none",), (True,))
    for model, engine, steps, checkpointing, padded in axes:
        yield Case(model, engine, world_size, steps, checkpointing, padded)


def few_cases(world_size: int, engines: Sequence[str] = ENGINES) -> Iterator[Case]:
    """A slice for every day: each value of each axis at least once."""
    for index, (model, engine) in enumerate(itertools.product(MODELS, engines)):
        # Latin square over the other axes.
        turn = index + index // len(engines)
        yield Case(model, engine, world_size, (1, 4)[turn % 2], CHECKPOINTING[turn % 3], turn % 4 < 2)
    for index, engine in enumerate(engines):
        yield Case(
            "bert-adapter",
            engine,
            world_size,
            (1, 4)[index % 2],
            CHECKPOINTING[index % 3],
            True,
            fisher="sampled",
        )


def variant_cases(world_size: int, engines: Sequence[str] = ENGINES) -> Iterator[Case]:
    """Every setting of K-FAC with every model, the engines in turn."""
    for index, (variant, model) in enumerate(itertools.product(list(VARIANTS)[1:], MODELS)):
        turn = index + index // len(MODELS)
        gas, checkpointing = ((1, 4)[turn % 2], CHECKPOINTING[turn % 3]) if world_size <= 2 else (1, "none")
        yield Case(model, engines[turn % len(engines)], world_size, gas, checkpointing, True, variant=variant)


def method_cases(method: str, world_size: int, engines: Sequence[str] = ENGINES) -> Iterator[Case]:
    """Another method with every model on every engine."""
    for index, (model, engine) in enumerate(itertools.product(MODELS, engines)):
        turn = index + index // len(engines)
        gas, checkpointing = ((1, 4)[turn % 2], CHECKPOINTING[turn % 3]) if world_size <= 2 else (1, "none")
        yield Case(model, engine, world_size, gas, checkpointing, True, method=method)


def option_cases(world_size: int, engines: Sequence[str] = ENGINES) -> Iterator[Case]:
    """Every option of other methods on every engine that has it, the models in turn."""
    options = [(method, name) for method, names in OPTIONS.items() for name in names]
    for index, ((method, name), engine) in enumerate(itertools.product(options, engines)):
        twice = OPTIONS[method][name].get("products") == "double_backward"
        if twice and engine in ("zero-3", "fsdp2"):
            continue
        turn = index + index // len(engines)
        # Reentrant checkpointing cannot be differentiated twice.
        checkpointing = "none" if twice or world_size > 2 else CHECKPOINTING[turn % 3]
        models = ONE_TERM if "block_parameters" in OPTIONS[method][name] else tuple(MODELS)
        model = models[turn % len(models)]
        yield Case(model, engine, world_size, 1 + turn % 2, checkpointing, True, variant=name, method=method)


def bf16_cases(world_size: int) -> Iterator[Case]:
    """All engines and models with weights in bf16."""
    for model, engine in itertools.product(MODELS, ENGINES):
        yield Case(model, engine, world_size, 1, "none", True, dtype="bfloat16")


@lru_cache(maxsize=32)
def _task(model: str, padded: bool) -> tuple[Any, TaskConfig]:
    del model
    config = TaskConfig(max_length=84 if padded else 56, train_examples=64, eval_examples=16)
    return tasks.load_task(config, 0), config


def build(case: Case, checkpointing: str) -> tuple[Any, Any]:
    """Model and data of a case; the weights depend on the model alone."""
    name, peft = MODELS[case.model]
    task, config = _task(case.model, case.padded)
    model_config = ModelConfig(
        name=name, init="random", dropout=0.0, attention="eager", gradient_checkpointing=checkpointing
    )
    bundle = tasks.models.load(model_config, task, config)
    bundle = tasks.adapters.apply(bundle, PeftConfig(**peft))
    _start_generic(bundle.model)
    _smooth(bundle.model)
    return bundle, tasks.prepare(task, bundle, config)


def _start_generic(model: torch.nn.Module) -> None:
    """Start from a generic point instead of a fresh initialization.

    With weights of 0.02 the tokens of a tiny model are nearly alike, gradients over the batch cancel and what is left
    is rounding; and a parameter that starts at zero is nothing but its updates. Trained models are neither.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.abs().max() < 0.01:
                parameter.normal_(std=0.05, generator=generator)
            elif parameter.dim() == 2 and parameter.std() < 0.1:
                parameter.mul_(0.1 / parameter.std())


def _smooth(model: torch.nn.Module) -> None:
    """Replace ReLU, whose derivative jumps: a pre-activation of 1e-8 has another sign after another rounding.

    One such flip in five steps moves a weight by 2e-5, whatever the engine, and says nothing about the split.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, name, torch.nn.GELU())


def kfac_config(case: Case, alone: bool = False) -> Config:
    """Settings under which a step has clipping, momentum, decay and averages to get wrong.

    Args:
        case: the cell.
        alone: for the single process, whose statistics do not travel.
    """
    settings = VARIANTS[case.variant]
    if alone:
        settings = {key: settings[key] for key in SHAPING if key in settings}
    return Config(
        lr=0.02,
        momentum=0.9,
        weight_decay=0.01,
        damping=0.1,
        factor_interval=[[0, 1], [3, 2]],
        inverse_interval=[[0, 1], [3, 2]],
        fisher=case.fisher,
        clip="post",
        tau=1.0,
        base=BaseConfig(type="SGD", lr=0.01),
        **settings,
    )


def method_config(case: Case, alone: bool = False) -> Any:
    """Settings of the case's method; of those that are not K-FAC what all of them have, and their own defaults."""
    if case.method == "KFAC":
        return kfac_config(case, alone)
    given = dict(lr=1e-3, momentum=0.5, weight_decay=0.01, clip="post", tau=5.0)
    config = resolve(case.method).Config
    intervals = {name: [[0, 1], [3, 2]] for name in config.model_fields if name.endswith("_interval")}
    blocks = {"block_side": 24} if "block_side" in config.model_fields else {}
    # As strong as K-FAC's above: what a weaker one makes of rounding is on the pages of the methods.
    damping = {"damping": 0.1} if config.damped else {}
    settings = {**intervals, **blocks, **damping, **case.settings}
    return config(**given, **settings, base={"type": "SGD", "lr": 0.01})


def train(engine: Any, data: Any, case: Case, rank: int, world_size: int, gas: int) -> dict[str, Tensor]:
    """Five steps on the global batches of the task; the trainable parameters, as far as this rank has whole ones."""
    engine.train()
    for step in range(STEPS):
        indices = tasks.data.global_batch(len(data.train), case.batch, 0, step)
        terms = sum(data.terms(i) for i in indices) / (world_size * gas)
        parts = list(tasks.data.micro_batches(indices, rank, world_size, gas))
        batches = [data.collate([data.train[i] for i in part], part).to(engine.device) for part in parts]

        def sampled(batch: Any, step: int = step, terms: float = terms) -> Tensor:
            return data.sampled_loss_sum(engine(**batch.inputs), batch, 0, step) / terms

        estimated = [data.micro_batch(engine, batch, terms, 0, step) for batch in batches]
        estimates.run(engine, lambda estimated=estimated: estimated)
        for batch in batches:
            loss = data.loss_sum(engine(**batch.inputs), batch) / terms
            engine.backward(loss, terms=terms)
            if engine.wants_sampled_pass():
                engine.sampled_pass(functools.partial(sampled, batch))
            engine.step()
        estimates.judge(engine, lambda estimated=estimated: estimated)
    found = dict(engine.gathered_state_dict())
    if found:
        return found
    own = {n: p.detach().cpu() for n, p in engine.module.named_parameters() if n in engine.shapes}
    whole = all(type(p.data) is Tensor and p.shape == engine.shapes[n] for n, p in own.items())
    return own if whole else {}


def reference(case: Case, device: torch.device = CPU) -> dict[str, Tensor]:
    """One process, the whole batch at once, no checkpointing."""
    bundle, data = build(case, "none")
    if case.dtype == "bfloat16":
        bundle.model.bfloat16()
    optimizer = make_optimizer(bundle.model, case.method, method_config(case, alone=True), device)
    engine = SingleEngine(bundle.model.to(device), optimizer, device, 1, case.batch)
    try:
        return train(engine, data, case, 0, 1, 1)
    finally:
        engine.close()


def sharded(case: Case, rank: int, device: torch.device = CPU) -> dict[str, Tensor]:
    """The same under the case's engine, on this rank of the running process group."""
    bundle, data = build(case, case.checkpointing)
    optimizer = make_optimizer(bundle.model, case.method, method_config(case), device)
    make = _own_layout if case.engine in OWN_LAYOUT else _deepspeed
    engine = make(case, bundle.model.to(device), optimizer, case.batch // case.world_size // case.gas, device)
    try:
        return train(engine, data, case, rank, case.world_size, case.gas)
    finally:
        engine.close()


def _own_layout(case: Case, model: Any, optimizer: Any, micro: int, device: torch.device) -> Any:
    if case.engine == "fsdp2":
        return FSDP2Engine(model, optimizer, device, case.gas, micro, dtype=getattr(torch, case.dtype))
    return DDPEngine(model.to(getattr(torch, case.dtype)), optimizer, device, case.gas, micro)


def _deepspeed(case: Case, model: Any, optimizer: Any, micro: int, device: torch.device) -> Any:
    ds_config = {
        "train_batch_size": case.batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": case.gas,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        # Small buckets cut parameters between ranks and reductions; small persistent parameters are cut as well.
        "zero_optimization": {
            "stage": int(case.engine[-1]),
            "sub_group_size": 10**12,
            "reduce_bucket_size": 20000,
            "allgather_bucket_size": 20000,
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": 10**9,
    }
    if case.dtype == "bfloat16":
        ds_config["bf16"] = {"enabled": True}
    return DeepSpeedEngine(model, optimizer, device, ds_config)


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference over the layers, and where it is.

    The scale is the largest element of the layer, weight and bias together, as K-FAC steps them together.
    """
    scales: dict[str, float] = {}
    for name, value in wanted.items():
        layer = name.rpartition(".")[0]
        scales[layer] = max(scales.get(layer, 1e-12), value.abs().max().item())
    worst, where = 0.0, ""
    for name, value in wanted.items():
        error = (found[name].float() - value.float()).abs().max().item() / scales[name.rpartition(".")[0]]
        # NaN is neither above nor below anything.
        error = error if math.isfinite(error) else math.inf
        if error > worst:
            worst, where = error, name
    return worst, where
