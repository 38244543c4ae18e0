"""What a run will need before it starts: memory of every rank, bytes on the wire, operations, and what fits.

In a program::

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    found = plan(model, load_recipe("recipe.json"), world_size=8, gpu_gb=80)
    print(text(found))

Everything follows from shapes: a model on the meta device does, and no process group is needed. Counted are weights,
gradients, optimizer state, factors, statistics, and the buffers that dsso and the engine make. **Activations are not
counted**, nor are temporary results inside single operations, the allocator's gaps and the context of the device
(about half a gigabyte on a GPU): what is left beside the peak has to hold them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from dsso.errors import RecipeError
from dsso.optim.kfac import Config
from dsso.parallel.placement import Strategy
from dsso.plan_kfac import KfacPlan, Window
from dsso.plan_layout import layout, traffic
from dsso.plan_model import Survey, survey
from dsso.recipe import Recipe, ResolvedRecipe, load_recipe

STRATEGIES: tuple[Strategy, ...] = ("communication_optimal", "hybrid_optimal", "memory_optimal")
"""From the least traffic to the least memory."""


@dataclass(frozen=True)
class RankBytes:
    """Memory of one rank in bytes.

    Attributes:
        weights: of the model, frozen ones and buffers included.
        masters: fp32 copies of trained weights, where the optimizer steps copies.
        moments: of the optimizer.
        factors: Kronecker factors with their factorizations.
        gradients: as the optimizer finds them when it steps.
        gradients_in_pass: most at the end of a micro-batch's backward pass.
        buckets: what the engine has only while a pass runs, at most.
        lasting: those of them that stay during the step.
        sums: of a window that measures all factors, most at one time.
        statistics: these sums and their buffers.
        statistics_later: of the largest window once measurements are spread.
        refresh: factorizations being made or waiting to be taken over, when all are due in one step.
        refresh_later: once they are spread.
        exchange: buffers for whole gradients and updates, at most.
        in_pass: everything at the end of the backward pass.
        in_step: everything in the optimizer's step.
    """

    weights: int
    masters: int
    moments: int
    factors: int
    gradients: int
    gradients_in_pass: int
    buckets: int
    lasting: int
    sums: int
    statistics: int
    statistics_later: int
    refresh: int
    refresh_later: int
    exchange: int
    in_pass: int
    in_step: int

    @property
    def optimizer(self) -> int:
        """Masters and moments."""
        return self.masters + self.moments

    @property
    def peak(self) -> int:
        """Most at one time, activations not counted."""
        return max(self.in_pass, self.in_step)


@dataclass(frozen=True)
class Wire:
    """Bytes on the wire.

    Attributes:
        gradients: a rank hands to the engine's reductions, per step.
        weights: a rank hands to the engine's gathering, per step.
        exchange: the busiest rank sends to others, per step: gradients to who preconditions them, updates back.
        statistics: a rank hands to the reductions to owners, per measurement of all factors.
        bases: broadcast, per measurement of all factors: what low-rank forms are measured against.
        factorizations: the busiest rank sends to other appliers, per factorization of all factors.
        per_step: all of it, averaged over the schedule's last intervals.
    """

    gradients: int = 0
    weights: int = 0
    exchange: int = 0
    statistics: int = 0
    bases: int = 0
    factorizations: int = 0
    per_step: int = 0


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of the busiest rank; products with weights only, attention scores not counted.

    Attributes:
        training: forward and backward passes of a step, at full length.
        apply: preconditioning, per step.
        measure: one measurement of all factors.
        refresh: one factorization of all factors.
        share: all that K-FAC adds to `training`, averaged over the schedule's last intervals.
    """

    training: float = 0.0
    apply: float = 0.0
    measure: float = 0.0
    refresh: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class StrategyRow:
    """One strategy of placement: who applies a layer's factors."""

    name: str
    factors: int
    peak: int
    wire_per_step: int
    fits: bool | None


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe that was planned.

    Attributes:
        change: in words.
        overrides: for `--set`.
        world_size: number of ranks.
        peak: most bytes of a rank.
        fits: into the memory asked for.
    """

    change: str
    overrides: tuple[str, ...]
    world_size: int
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        engine: `single`, `ddp`, `fsdp2`, or `zero-0` to `zero-3`.
        world_size: number of ranks.
        dtype: of the weights in the passes.
        optimizer: `optimizer.type`.
        strategy: of the placement; empty for a baseline.
        parameters, trained: elements.
        factors: number of Kronecker factors.
        largest_unit: bytes of the layers that cannot be placed apart, at most.
        shared: layers that use the input factor of another layer.
        ranks: memory of every rank.
        sent_in_pass: statistics leave while the backward pass runs, so that few sums are there at one time.
        all_until: first step from which on a step measures a part of the factors; None: never.
        wire: bytes on the wire.
        operations: of the busiest rank.
        gpu_bytes: memory asked for, None where none was.
        strategies: what each strategy needs.
        remedies: what was tried where it does not fit, up to the first that does.
        rows: `parameter, shape, method, owner, reason` of every trained parameter.
        notes: what the user should know.
    """

    engine: str
    world_size: int
    dtype: str
    optimizer: str
    strategy: str
    parameters: int
    trained: int
    factors: int
    largest_unit: int
    shared: int
    ranks: tuple[RankBytes, ...]
    sent_in_pass: bool
    all_until: int | None
    wire: Wire
    operations: Operations
    gpu_bytes: int | None = None
    strategies: tuple[StrategyRow, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> RankBytes:
        """The rank with the largest peak."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def fits(self) -> bool | None:
        """Whether every rank's peak is within the memory asked for; None where none was."""
        return None if self.gpu_bytes is None else self.worst.peak <= self.gpu_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON, with what follows from it."""
        out = dataclasses.asdict(self)
        out["peak"], out["fits"] = self.worst.peak, self.fits
        return out


def plan(
    model: nn.Module,
    recipe: Recipe,
    world_size: int,
    gpu_gb: float | None = None,
    engine: str | None = None,
    example: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a run of a model; nothing is allocated, and the model is left as it is.

    Args:
        model: the unwrapped model with its adapters and `requires_grad` flags, best on the meta device, its weights
            in the type of the passes.
        recipe: from `dsso.recipe.load_recipe`.
        world_size: number of ranks.
        gpu_gb: memory of a device in 1e9 bytes; None asks for no verdict.
        engine: in the place of the recipe's, e.g. `single` for a run without a launcher.
        example: keyword arguments of a small forward pass; None: made up for a Hugging Face model.

    Raises:
        RecipeError: the recipe does not go with that number of ranks, or nothing is trained.
    """
    seen = survey(model, recipe.optimizer_config, example)
    wanted = None if gpu_gb is None else int(gpu_gb * 1e9)
    found = _plan(seen, resolve(recipe, world_size), engine, wanted)
    if isinstance(recipe.optimizer_config, Config):
        rows = [_plan(seen, resolve(recipe, world_size), engine, wanted, strategy) for strategy in STRATEGIES]
        table = tuple(
            StrategyRow(r.strategy, max(x.factors for x in r.ranks), r.worst.peak, r.wire.per_step, r.fits)
            for r in rows
        )
        found = dataclasses.replace(found, strategies=table)
    if found.fits is False:
        found = dataclasses.replace(found, remedies=tuple(_remedies(seen, recipe, found, engine)))
    return found


def resolve(recipe: Recipe, world_size: int) -> ResolvedRecipe:
    """The recipe for that number of ranks; the length of the run need not be known.

    Raises:
        RecipeError: the recipe does not go with that number of ranks.
    """
    total = recipe.raw.get("scheduler", {}).get("params", {}).get("total_num_steps")
    steps = recipe.dsso.train.max_steps
    if steps is None and recipe.dsso.train.epochs is not None and "scheduler" in recipe.raw:
        # Its values do not matter here, only that "auto" can be filled in.
        steps = total if isinstance(total, int) else 10**9
    return recipe.resolved(world_size, steps)


def _plan(
    seen: Survey,
    recipe: ResolvedRecipe,
    engine: str | None,
    gpu_bytes: int | None,
    strategy: Strategy | None = None,
) -> Plan:
    kind = engine or recipe.dsso.engine
    kind = f"zero-{recipe.zero_stage}" if kind == "deepspeed" else kind
    config, world = recipe.optimizer_config, recipe.world_size
    method = KfacPlan(seen, config, world, recipe.gas, strategy) if isinstance(config, Config) else None
    if recipe.is_method and method is None:
        raise RecipeError(
            "no plan can be made for this method", where="optimizer.type", got=recipe.optimizer_type
        )
    shares = [layout(seen, recipe, kind, rank) for rank in range(world)]
    moments = _moments(seen, recipe)
    exchanges = method.exchange([share.held for share in shares]) if method else None
    nothing = Window()
    ranks = []
    for rank, share in enumerate(shares):
        kept = {moment for name, numel in share.held.items() if numel for moment in moments[name]}
        state = len(kept) * 4 * share.partition
        factors = method.state_bytes(rank) if method else 0
        first = method.first_window(rank) if method else nothing
        later = method.later_window(rank) if method else nothing
        exchange = exchanges[rank] if exchanges else None
        lasting = share.weights + share.masters + state + factors
        measured = first.sums + first.buffers
        in_step = share.averaging
        if exchange is not None:
            in_step = max(in_step, exchange.peak, exchange.owned + first.peak)
        ranks.append(
            RankBytes(
                weights=share.weights,
                masters=share.masters,
                moments=state,
                factors=factors,
                gradients=share.gradients,
                gradients_in_pass=share.passes,
                buckets=share.buckets,
                lasting=share.lasting,
                sums=first.sums,
                statistics=measured,
                statistics_later=later.sums + later.buffers,
                refresh=first.refresh,
                refresh_later=later.refresh,
                exchange=exchange.peak if exchange else 0,
                in_pass=lasting + share.passes + share.buckets + measured,
                in_step=lasting + share.gradients + share.lasting + in_step,
            )
        )
    sent = traffic(seen, recipe, kind)
    wire = _wire(sent.gradients, sent.weights, method, max((e.sent for e in exchanges or ()), default=0))
    return Plan(
        engine=kind,
        world_size=world,
        dtype=recipe.precision.dtype,
        optimizer=recipe.optimizer_type,
        strategy="" if method is None else strategy or method.config.strategy,
        parameters=seen.total,
        trained=sum(weight.numel for weight in seen.trained),
        factors=0 if method is None else len(method.placement.factors),
        largest_unit=0 if method is None else method.largest_unit,
        shared=sum(layer.a_key != f"{layer.name}/a" for layer in seen.layers),
        ranks=tuple(ranks),
        sent_in_pass=method is not None and method.sent_in_pass,
        all_until=None if method is None else method.all_until,
        wire=wire,
        operations=_operations(seen, recipe, method),
        gpu_bytes=gpu_bytes,
        rows=tuple(_rows(seen, recipe, method)),
        notes=seen.notes,
    )


def _rows(seen: Survey, recipe: ResolvedRecipe, method: KfacPlan | None) -> Iterator[dict[str, Any]]:
    """Which method takes which parameter, and who owns its factors."""
    owners = {}
    if method is not None:
        owners = {n: method.placement.owner[layer.name] for layer in seen.layers for n in layer.parameters}
    config = recipe.optimizer_config
    for weight in seen.trained:
        kind = recipe.optimizer_type
        if isinstance(config, Config) and weight.name not in owners:
            kind = config.base.type
        yield {
            "parameter": weight.name,
            "shape": weight.shape,
            "method": kind,
            "owner": owners.get(weight.name),
            "reason": seen.rest.get(weight.name, ""),
        }


def _moments(seen: Survey, recipe: ResolvedRecipe) -> dict[str, tuple[str, ...]]:
    """Moments that the rule of every trained parameter keeps."""
    config: Any = recipe.optimizer_config

    def of(kind: str, momentum: float) -> tuple[str, ...]:
        if kind.lower() == "sgd":
            return ("exp_avg",) if momentum else ()
        return ("exp_avg", "exp_avg_sq")

    if not isinstance(config, Config):
        kept = of(recipe.optimizer_type, getattr(config, "momentum", 0.0))
        return {weight.name: kept for weight in seen.trained}
    base = of(config.base.type, config.base.momentum)
    own = base if config.base.applies_to == "all" else of("sgd", config.momentum)
    return {weight.name: base if weight.name in seen.rest else own for weight in seen.trained}


def _every(config: Config) -> tuple[float, float]:
    """How much of a measurement and of a factorization of all factors falls on a step in the long run."""
    shares = []
    for interval in (config.factor_interval, config.inverse_interval):
        every = interval.segments[-1][1]
        shares.append(1.0 / every if every else 0.0)
    return shares[0], shares[1]


def _wire(gradients: int, weights: int, method: KfacPlan | None, exchange: int) -> Wire:
    if method is None:
        return Wire(gradients, weights, per_step=gradients + weights)
    measured, made = _every(method.config)
    statistics, bases, sent = method.statistics_wire, method.bases_wire, method.factorizations_wire
    total = gradients + weights + exchange + measured * (statistics + bases) + made * sent
    return Wire(gradients, weights, exchange, statistics, bases, sent, int(total))


def _operations(seen: Survey, recipe: ResolvedRecipe, method: KfacPlan | None) -> Operations:
    """Of a rank's examples at full length."""
    task, examples = recipe.dsso.task, recipe.micro_batch * recipe.gas
    source = examples * task.max_length
    rows = {"encoder": source, "cross": source, "decoder": examples * task.max_target_length}
    if not seen.encoder_decoder:
        rows["decoder"] = source
    forward = sum(2.0 * one.size * rows[one.side] for one in seen.linears)
    gradients = sum(2.0 * one.size * rows[one.side] for one in seen.linears if one.trained)
    # Gradients of inputs run back through frozen layers as well.
    training = forward * (3 if seen.checkpointing else 2) + gradients
    if method is None:
        return Operations(training=training)
    config = method.config
    measured, made = _every(config)
    if config.approximation == "reduce":
        rows = dict.fromkeys(rows, examples)
    else:
        rows = {side: -(-count // config.token_stride) for side, count in rows.items()}
    measure, refresh, apply = method.measure_flops(rows), max(method.refresh_flops), method.apply_flops
    extra = apply + measured * measure + made * refresh
    return Operations(training, apply, measure, refresh, extra / training if training else 0.0)


def _remedies(seen: Survey, recipe: Recipe, found: Plan, engine: str | None) -> Iterator[Remedy]:
    """Plan the alternatives one after the other, up to the first that fits."""
    for change, overrides, world in _alternatives(recipe, found):
        try:
            changed = load_recipe(recipe.raw, overrides)
            other = engine if world == found.world_size else None
            planned = _plan(seen, resolve(changed, world), other, found.gpu_bytes)
        except RecipeError:
            continue  # the batch does not divide, or the engine cannot do it
        yield Remedy(change, overrides, world, planned.worst.peak, bool(planned.fits))
        if planned.fits:
            return


def _alternatives(recipe: Recipe, found: Plan) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Changes in words, as overrides, and the number of ranks; what leaves the step as it is comes first."""
    world = found.world_size
    same: list[tuple[str, str]] = []
    config = recipe.optimizer_config
    method = isinstance(config, Config)
    if isinstance(config, Config) and config.strategy != "memory_optimal":
        same.append(("memory-optimal placement", "optimizer.params.strategy=memory_optimal"))
    if found.engine == "ddp":
        same.append(("FSDP2", "dsso.engine=fsdp2"))
    if found.engine.startswith("zero-"):
        stages = range(recipe.zero_stage + 1, 4)
        same += [(f"ZeRO stage {stage}", f"zero_optimization.stage={stage}") for stage in stages]
    smaller: list[tuple[str, str]] = []
    if isinstance(config, Config):
        if config.storage != "bfloat16":
            smaller.append(("factors in bfloat16", "optimizer.params.storage=bfloat16"))
        sides = [s for s in (4096, 2048, 1024, 512) if config.block_side is None or s < config.block_side]
        smaller += [(f"blocks of {side}", f"optimizer.params.block_side={side}") for side in sides]
        kept = [k for k in (64, 32) if config.low_rank is None or k < config.low_rank]
        smaller += [(f"low rank {rank}", f"optimizer.params.low_rank={rank}") for rank in kept]
    for change, override in same:
        yield change, (override,), world
    for change, override in smaller:
        yield change, (override,), world
    for change, override in same[-1:]:
        for other, second in smaller:
            yield f"{change} and {other}", (override, second), world
    for times in (2, 4, 8):
        yield f"{times * world} ranks", (), times * world
        for change, override in same[-1:]:
            yield f"{times * world} ranks and {change}", (override,), times * world
            if method:
                yield (
                    f"{times * world} ranks, {change} and low rank 32",
                    (override, "optimizer.params.low_rank=32"),
                    times * world,
                )


assert set(STRATEGIES) == set(get_args(Strategy))
