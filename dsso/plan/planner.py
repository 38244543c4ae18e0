"""From a model, a recipe and a number of ranks to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from torch import nn

from dsso.errors import RecipeError
from dsso.optim import ekfac, is_forward, kfac
from dsso.optim._elementwise import ElementwiseConfig
from dsso.optim._estimation import Estimation
from dsso.optim._gradient_config import GradientConfig
from dsso.optim._kronecker_config import KroneckerConfig
from dsso.optim._matrix_config import MatrixConfig
from dsso.parallel.placement import Strategy
from dsso.plan.blocks import MatrixPlan
from dsso.plan.ekfac import EkfacPlan
from dsso.plan.factors import KroneckerPlan
from dsso.plan.forward import forward_plan
from dsso.plan.kfac import KfacPlan
from dsso.plan.layout import Layout, layout, traffic
from dsso.plan.model import Survey, survey
from dsso.plan.remedies import alternatives
from dsso.plan.report import Operations, Plan, RankBytes, Remedy, StrategyRow, Window
from dsso.plan.wire import of_estimates, on_the_wire
from dsso.recipe import Recipe, ResolvedRecipe, load_recipe

STRATEGIES: tuple[Strategy, ...] = ("communication_optimal", "hybrid_optimal", "memory_optimal")
"""From the least traffic to the least memory."""
assert set(STRATEGIES) == set(get_args(Strategy))


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
    if isinstance(recipe.optimizer_config, KroneckerConfig):
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
    if is_forward(recipe.optimizer_type):
        return forward_plan(seen, recipe, kind, gpu_bytes)
    config, world = recipe.optimizer_config, recipe.world_size
    method: KroneckerPlan | MatrixPlan | None = None
    if isinstance(config, kfac.Config):
        method = KfacPlan(seen, config, world, recipe.gas, strategy)
    elif isinstance(config, ekfac.Config):
        method = EkfacPlan(seen, config, world, recipe.gas, strategy)
    elif isinstance(config, MatrixConfig):
        method = MatrixPlan(seen, recipe.optimizer_type, config, world)
    if recipe.is_method and method is None and not isinstance(config, ElementwiseConfig):
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
        vectors = seen.kept_whole + _vectors(seen, config, share, method)
        answers = method.answers(rank) if isinstance(method, MatrixPlan) else 0
        # What came out of a window is one more; blocks are copied once to be factorized.
        solving = vectors + 4 * share.partition + seen.kept_whole if vectors else 0
        if getattr(config, "adaptive_damping", None) is not None:
            # The weights that a step began with; while it is judged there is a third copy, and no gradient any more.
            solving += 4 * share.partition
        in_step = share.averaging
        if exchange is not None:
            in_step = max(in_step, exchange.peak, exchange.owned + first.peak)
        in_step += answers
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
                in_pass=lasting + share.passes + share.buckets + measured + max(vectors, answers),
                in_step=lasting + share.gradients + share.lasting + max(in_step, solving),
                vectors=vectors,
                answers=answers,
            )
        )
    sent = traffic(seen, recipe, kind)
    estimation = config.estimation(seen.classes) if isinstance(config, GradientConfig) else Estimation()
    wire = on_the_wire(
        sent, method, exchanges or (), of_estimates(estimation, sent, seen, shares, exchanges or ())
    )
    return Plan(
        engine=kind,
        world_size=world,
        dtype=recipe.precision.dtype,
        optimizer=recipe.optimizer_type,
        strategy="" if method is None else method.strategy,
        parameters=seen.total,
        trained=sum(weight.numel for weight in seen.trained),
        factors=0 if method is None else method.count,
        largest_unit=0 if method is None else method.largest_unit,
        shared=sum(layer.a_key != f"{layer.name}/a" for layer in seen.layers),
        ranks=tuple(ranks),
        sent_in_pass=method is not None and method.sent_in_pass,
        all_until=None if method is None else method.all_until,
        wire=wire,
        operations=_operations(seen, recipe, method, estimation),
        gpu_bytes=gpu_bytes,
        rows=tuple(_rows(seen, recipe, method)),
        notes=seen.notes,
        parts="" if method is None else method.parts,
    )


def _vectors(seen: Survey, config: Any, share: Layout, method: KroneckerPlan | MatrixPlan | None) -> int:
    """Bytes that live through windows of estimation, beyond the gradients of any other window."""
    if not isinstance(config, GradientConfig) or not config.working:
        return 0
    numbers, probed = share.partition, {weight.name: weight.numel for weight in seen.trained}
    if isinstance(method, MatrixPlan):
        probed = {name: numel for name, numel in probed.items() if name in method.owners}
        numbers = sum(share.held.get(name, 0) for name in probed)
    found = 4 * config.working * numbers
    if config.products_of_curvature == "double_backward":
        # Every rank has the direction whole, and gradients of nothing but what is probed.
        found += 4 * sum(probed.values())
        found -= share.passes - share.passes * sum(probed.values()) // sum(w.numel for w in seen.trained)
    return found


def _rows(
    seen: Survey, recipe: ResolvedRecipe, method: KroneckerPlan | MatrixPlan | None
) -> Iterator[dict[str, Any]]:
    """Which method takes which parameter, and who owns its factors."""
    owners = {} if method is None else method.owners
    config = recipe.optimizer_config
    for weight in seen.trained:
        kind = recipe.optimizer_type
        taken = weight.name not in seen.rest if method is None else weight.name in owners
        if isinstance(config, GradientConfig) and not taken:
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

    if not isinstance(config, GradientConfig):
        kept = of(recipe.optimizer_type, getattr(config, "momentum", 0.0))
        return {weight.name: kept for weight in seen.trained}
    base = of(config.base.type, config.base.momentum)
    own = base if config.base.applies_to == "all" else of("sgd", config.momentum)
    if isinstance(config, ElementwiseConfig):
        own = (*own, *config.kept)
    return {weight.name: base if weight.name in seen.rest else own for weight in seen.trained}


def _operations(
    seen: Survey,
    recipe: ResolvedRecipe,
    method: KroneckerPlan | MatrixPlan | None,
    estimation: Estimation,
) -> Operations:
    """Of a rank's examples at full length."""
    task, examples = recipe.dsso.task, recipe.micro_batch * recipe.gas
    rows = seen.tokens(examples, task.max_length, task.max_target_length)
    forward = sum(2.0 * one.size * rows[one.side] for one in seen.linears)
    gradients = sum(2.0 * one.size * rows[one.side] for one in seen.linears if one.trained)
    # Gradients of inputs run back through frozen layers as well.
    training = forward * (3 if seen.checkpointing else 2) + gradients
    estimates = (estimation.windows + estimation.twice) * training + estimation.forwards * forward
    if method is None:
        share = estimates / training if training else 0.0
        return Operations(training=training, estimates=estimates, share=share)
    measured, made = method.often
    if isinstance(method, KroneckerPlan):
        if method.config.approximation == "reduce":
            rows = dict.fromkeys(rows, examples)
        else:
            rows = {side: -(-count // method.config.token_stride) for side, count in rows.items()}
    measure, refresh, apply = method.measure_flops(rows), max(method.refresh_flops), method.apply_flops
    extra = apply + measured * measure + made * refresh + estimates
    return Operations(
        training=training,
        apply=apply,
        measure=measure,
        refresh=refresh,
        estimates=estimates,
        share=extra / training if training else 0.0,
    )


def _remedies(seen: Survey, recipe: Recipe, found: Plan, engine: str | None) -> Iterator[Remedy]:
    """Plan the alternatives one after the other, up to the first that fits."""
    for change, overrides, world in alternatives(recipe, found):
        try:
            changed = load_recipe(recipe.raw, overrides)
            other = engine if world == found.world_size else None
            planned = _plan(seen, resolve(changed, world), other, found.gpu_bytes)
        except RecipeError:
            continue  # the batch does not divide, or the engine cannot do it
        yield Remedy(change, overrides, world, planned.worst.peak, bool(planned.fits))
        if planned.fits:
            return
