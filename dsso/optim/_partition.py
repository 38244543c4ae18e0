"""The optimizer that an engine steps: method, clipping and base method on whatever pieces this rank holds.

To the engine it is a plain `torch.optim.Optimizer` over flat fp32 partitions, whose gradients arrive averaged,
unscaled and complete once per accumulation window. One step:

    gradients --fragments--> owners --method--> updates of owned parameters
    one reduction: ||u||^2, <u, g>, ||g||^2, not finite, waiting
    updates --fragments--> the holders' gradient buffers, in place, times the clip scale
    base method on the partition

All decisions that need a device value are taken on the device, or one step later (`dsso.parallel.deferred`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsso.clip import ClipMode, NormQuantile, StepNorms, clip_scale, cosine
from dsso.optim._elementwise import ElementwiseMethod, ElementwisePieces
from dsso.optim._estimating import EstimatingMethod, Pieces
from dsso.optim._rules import Rule, apply_adamw, apply_sgd
from dsso.optim._trust import Trust
from dsso.optim.base import GradientMethod
from dsso.parallel import collectives
from dsso.parallel.deferred import Deferred
from dsso.parallel.fragments import FragmentExchange, Span, SpanTable
from dsso.phases import phase, phased
from dsso.schedule import Scalar, value


@dataclass(frozen=True)
class Clipping:
    """What bounds the update; see `dsso.clip`."""

    mode: ClipMode = "none"
    tau: Scalar = 1.0
    kl_clip: float | None = None
    adaptive: NormQuantile | None = None


@dataclass(frozen=True)
class Warmup:
    """Steps of first order before those of the method."""

    steps: int = 0
    scale: float = 1.0


@dataclass
class _Piece:
    """Adjacent spans under one rule."""

    rule: Rule
    buffer: int
    offset: int
    numel: int
    step: Tensor = field(default_factory=lambda: torch.zeros(()))


class PartitionOptimizer(torch.optim.Optimizer):
    """Optimizer over the flat buffers of this rank.

    Args:
        params: the model's trainable parameters; the engine replaces them by its flat partitions.
        lr: learning rate, kept in `param_groups[0]["lr"]` where schedulers set it.
        rules: base rule of every trainable parameter, by name.
        method: what turns gradients into updates; None leaves all parameters to their rules.
        clipping: bound on the update.
        warmup: first steps that go along the gradient; the method takes its statistics and refreshes in them.
        trust: what the method's damping follows; None: nothing.

    Attributes:
        steps: calls of `step` so far; skipped ones count, steps that the engine itself dropped do not.
        consecutive_skips, skipped: non-finite steps, known one step late.
        table: the layout of all ranks, once attached.
        dry_run: set while an engine is being built, which may step once to have states allocated.
        estimating: the next step ends a window of estimation: nothing moves.
        direct: the pieces that an elementwise method steps.
        probing: those that windows of estimation are about.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        rules: Mapping[str, Rule],
        method: GradientMethod | None,
        clipping: Clipping,
        warmup: Warmup = Warmup(),
        trust: Trust | None = None,
    ) -> None:
        super().__init__([{"params": list(params)}], {"lr": lr})
        self.rules = dict(rules)
        self.method = method
        self.clipping = clipping
        self.warmup = warmup
        self.trust = trust
        self.steps = 0
        self.skipped = 0
        self.consecutive_skips = 0
        self.table = SpanTable({}, ())
        self.dry_run = self.estimating = False
        self.direct: ElementwisePieces | None = None
        self.probing: Pieces | None = None
        self._buffers: list[Tensor] = []
        self._pieces: list[_Piece] = []
        self._by_rule: dict[Rule, list[_Piece]] = {}
        self._rest: list[Span] = []
        self._rest_weight = 1.0
        self._exchange: FragmentExchange | None = None
        self._counted: list[str] = []
        self._outcome = Deferred()
        self._retry = False
        self._norms: StepNorms | None = None
        self._scale = self._tau = torch.ones(())
        self._clip_events = torch.zeros(())
        self._failures = self._without = torch.zeros(())

    @property
    def method_name(self) -> str | None:
        """Name of the method, as a recipe's `type` in lower case; None for a baseline."""
        return None if self.method is None else type(self.method).__module__.rsplit(".", 1)[-1]

    # -- attachment ---------------------------------------------------------------------------------------------

    def attach(self, buffers: Sequence[Tensor], spans: Sequence[Span], sizes: Mapping[str, int]) -> SpanTable:
        """Learn the layout; collective. Called once, when the engine has laid out its partitions.

        Args:
            buffers: flat (or to be flattened) fp32 tensors that this rank updates; their `.grad` is read in `step`.
            spans: which piece of which parameter lies where in them.
            sizes: elements of every trainable parameter, in model order.

        Returns:
            The table of all ranks.

        Raises:
            ValueError: when a parameter is not held completely.
        """
        table = SpanTable.collect(sizes, spans)
        table.check()
        self.table = table
        me, world = collectives.rank(), collectives.world_size()
        self._buffers = list(buffers)
        owners = {} if self.method is None else self.method.owners
        workers = {} if self.method is None else self.method.workers
        self._exchange = FragmentExchange(table, workers, me) if workers else None
        self._counted = [name for name, owner in owners.items() if owner == me]
        taken = frozenset() if self.method is None else self.method.taken
        self._rest = [s for s in table.ranks[me] if s.name not in owners and s.name not in taken and s.numel]
        replicated = all(sum(s.numel for s in spans_) == sum(sizes.values()) for spans_ in table.ranks)
        self._rest_weight = 1.0 / world if replicated else 1.0
        self._pieces = self._merge(table.ranks[me])
        self._by_rule = {}
        for piece in self._pieces:
            self._by_rule.setdefault(piece.rule, []).append(piece)
        device = self._buffers[0].device
        self._scale = torch.ones((), device=device)
        self._clip_events = torch.zeros((), device=device)
        if self.clipping.adaptive is not None:
            self.clipping.adaptive.norms = self.clipping.adaptive.norms.to(device)
        self._failures = self._without = torch.zeros((), device=device)
        self._allocate()
        if isinstance(self.method, ElementwiseMethod):
            self.probing = self.direct = self._pieces_of(self.method)
        elif isinstance(self.method, EstimatingMethod):
            self.probing = Pieces.of_spans(self.method, self._buffers, self._rest_weight, table)
        return table

    def _pieces_of(self, method: ElementwiseMethod) -> ElementwisePieces:
        """The pieces that an elementwise method works on."""
        mine = [piece for piece in self._pieces if piece.rule.kept]
        places = [(piece.buffer, piece.offset, piece.numel) for piece in mine]
        states = [self.state[buffer] for buffer in self._buffers]
        kept = next((piece.rule.kept for piece in mine), ())
        return ElementwisePieces(method, places, self._buffers, states, kept, self._rest_weight, self.table)

    def _merge(self, spans: Sequence[Span]) -> list[_Piece]:
        pieces: list[_Piece] = []
        for span in sorted((s for s in spans if s.numel), key=lambda s: (s.buffer, s.offset)):
            rule = self.rules[span.name]
            last = pieces[-1] if pieces else None
            if (
                last
                and last.rule == rule
                and last.buffer == span.buffer
                and last.offset + last.numel == span.offset
            ):
                last.numel += span.numel
            else:
                pieces.append(_Piece(rule, span.buffer, span.offset, span.numel))
        return pieces

    def _allocate(self) -> None:
        """Moments of every buffer, in full and at once: state is complete from the start.

        They are kept as flat tensors under the names that engines know (`exp_avg`, `exp_avg_sq`, `step`).
        """
        kept = {moment for piece in self._pieces for moment in piece.rule.moments}
        for buffer in self._buffers:
            state = self.state[buffer]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=buffer.device)
                for moment in sorted(kept):
                    state[moment] = torch.zeros_like(buffer, requires_grad=False)

    # -- a window -----------------------------------------------------------------------------------------------

    def begin_window(self) -> None:
        """The first micro-batch of an accumulation window is about to run."""
        if self.method is not None:
            self.method.damping_factor = 1.0 if self.trust is None else self.trust.settle()
            self.method.begin_window(self.steps, self._retry)

    def _flat(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)

    def _gradients(self) -> list[Tensor]:
        """Flat gradients of the buffers; a parameter that the loss does not reach has a zero one."""
        out = []
        for buffer in self._buffers:
            if buffer.grad is None:
                buffer.grad = torch.zeros_like(buffer, requires_grad=False)
            elif not buffer.grad.is_contiguous():
                buffer.grad = buffer.grad.contiguous()
            out.append(self._flat(buffer.grad))
        return out

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients of the attached buffers; collective.

        Raises:
            RuntimeError: when `attach` was not called, or with a closure.
        """
        if closure is not None:
            raise RuntimeError(
                "this optimizer takes no closure: it needs gradients that the engine has averaged"
            )
        if self.dry_run:
            return
        if not self._buffers:
            raise RuntimeError(
                "the optimizer is not attached to an engine: call attach() or dsso.initialize()"
            )
        if self.estimating:
            assert self.probing is not None
            self.probing.estimate(self._gradients())
            return
        self._read_outcome()
        if self.trust is not None:
            self.trust.remember(self.steps, self._buffers, self._rest_weight)
        gradients = self._gradients()
        lr = float(self.param_groups[0]["lr"])
        updates: dict[str, Tensor] = {}
        owned: dict[str, Tensor] = {}
        figures = gradients[0].new_zeros(3)
        lost = torch.zeros((), dtype=torch.bool, device=figures.device)
        if self.method is not None:
            owned = self._exchange.gather(gradients) if self._exchange else {}
            lost = self._update_statistics(gradients, lost)
            with phase("precondition"):
                updates, figures = self.method.precondition(owned)
            if self.steps < self.warmup.steps:
                updates = {name: owned[name] * self.warmup.scale for name in updates}
        direct = None
        if self.direct is not None:
            first = self.warmup.scale if self.steps < self.warmup.steps else None
            with phase("precondition"):
                direct = self.direct.act(gradients, ~lost, first)
        self._norms = self._reduce(gradients, owned, updates, direct, lost, figures)
        self._finish(gradients, updates, lr)
        self.steps += 1

    def _update_statistics(self, gradients: Sequence[Tensor], lost: Tensor) -> Tensor:
        """Let the method take its statistics, unless the window is not finite on some rank."""
        assert self.method is not None
        measured = self.method.measured_badly()
        if measured is None:
            self.method.update(self.steps, None)
            return lost
        finite = torch.stack(torch._foreach_norm(list(gradients))).isfinite().all()
        bad = (measured | ~finite).to(torch.float32)
        bad = collectives.all_sum(bad.reshape(1))[0] > 0
        self.method.update(self.steps, bad)
        return bad

    @phased("clip")
    def _reduce(
        self,
        gradients: Sequence[Tensor],
        owned: Mapping[str, Tensor],
        updates: Mapping[str, Tensor],
        direct: Tensor | None,
        lost: Tensor,
        figures: Tensor,
    ) -> StepNorms:
        """The global scalars of the step, in one all-reduce."""
        zero = gradients[0].new_zeros(())
        uu, ug, gg = zero, zero, zero
        if self._counted:
            # Several ranks may work on one parameter; it is counted once.
            us, gs = [updates[name] for name in self._counted], [owned[name] for name in self._counted]
            uu, gg = (torch.stack(torch._foreach_norm(each)).square().sum() for each in (us, gs))
            ug = torch.stack([torch.dot(u, g) for u, g in zip(us, gs, strict=True)]).sum()
        if self._rest:
            views = [gradients[s.buffer].narrow(0, s.offset, s.numel) for s in self._rest]
            rest = torch.nn.utils.get_total_norm(views).square().to(zero.dtype) * self._rest_weight
            uu, ug, gg = uu + rest, ug + rest, gg + rest
        figures = figures.to(zero)
        if direct is not None and self.direct is not None:
            uu, ug, gg = uu + direct[0], ug + direct[1], gg + direct[2]
            figures = torch.cat([figures, self.direct.counts()])
        # Infinity minus infinity must not hide: the flag is summed as a number of its own.
        bad = (lost | ~torch.isfinite(uu + gg + ug)).to(zero.dtype)
        total = collectives.all_sum(torch.cat([torch.stack([uu, ug, gg, bad]), figures]))
        flag = (total[3] > 0) | ~torch.isfinite(total[0] + total[2])
        waiting, failed, self._without = total[4:7]
        if self.direct is not None:
            self.direct.method.note(total[7:])
        self._failures = self._failures + failed
        self._outcome.push(torch.stack([flag.to(zero.dtype), waiting]))
        return StepNorms(total[0], total[1], total[2], flag)

    def _finish(self, gradients: list[Tensor], updates: Mapping[str, Tensor], lr: float) -> None:
        """Write the updates back, scale them, apply the base rules."""
        assert self._norms is not None
        clipping, norms = self.clipping, self._norms
        fixed = value(clipping.tau, self.steps)
        tau: float | Tensor = fixed
        if clipping.adaptive is not None:
            tau = self._tau = clipping.adaptive.bound(fixed)
            bounded = norms.gg if clipping.mode == "pre" else norms.uu
            if self.steps >= self.warmup.steps:
                # Lengths of gradients say nothing of those of the method's steps.
                clipping.adaptive.note(self.steps, bounded.sqrt(), norms.bad)
        self._scale = clip_scale(norms, clipping.mode, tau, clipping.kl_clip, lr)
        self._clip_events += ((self._scale < 1.0) & ~norms.bad).to(torch.float32)
        if self._exchange is not None:
            self._exchange.scatter(updates, gradients)
        if clipping.mode != "none" or clipping.kl_clip is not None:
            torch._foreach_mul_(gradients, self._scale)
        self._apply(gradients, lr)

    @phased("base rule")
    def _apply(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Base rules on all pieces, rule by rule."""
        assert self._norms is not None
        bad = self._norms.bad
        for rule, pieces in self._by_rule.items():
            parameters = [self._view(self._buffers[p.buffer].detach(), p) for p in pieces]
            updates = [self._view(gradients[p.buffer], p) for p in pieces]
            states = [self.state[self._buffers[p.buffer]] for p in pieces]
            rate = lr * rule.lr_ratio
            if rule.name == "sgd":
                momenta = (
                    [self._view(s["exp_avg"], p) for s, p in zip(states, pieces, strict=True)]
                    if rule.momentum
                    else updates
                )
                apply_sgd(rule, parameters, updates, momenta, rate, bad)
            else:
                first = [self._view(s["exp_avg"], p) for s, p in zip(states, pieces, strict=True)]
                second = [self._view(s["exp_avg_sq"], p) for s, p in zip(states, pieces, strict=True)]
                # The kernel counts every tensor's own steps; ours share one count a buffer.
                steps = [s["step"].clone() for s in states]
                apply_adamw(rule, parameters, updates, (first, second), steps, rate, bad)
        taken = (~bad).to(torch.float32)
        for buffer in self._buffers:
            self.state[buffer]["step"] += taken.to(buffer.device)

    def _view(self, tensor: Tensor, piece: _Piece) -> Tensor:
        return self._flat(tensor).narrow(0, piece.offset, piece.numel)

    def _read_outcome(self) -> None:
        """What the step before this one came to: count skips, and repeat a refresh that was lost or came too early."""
        outcome = self._outcome.pop()
        self._retry = False
        if outcome is None:
            return
        bad, waiting = outcome
        self.skipped += int(bad > 0)
        self.consecutive_skips = self.consecutive_skips + 1 if bad > 0 else 0
        self._retry = bad > 0 or waiting > 0

    # -- reports and state --------------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        """Figures of the last step; synchronizes with the device."""
        if self._norms is None:
            return {}
        norms = self._norms
        figures = torch.stack(
            [
                norms.uu.sqrt(),
                norms.gg.sqrt(),
                cosine(norms),
                self._scale,
                self._clip_events,
                norms.bad.to(norms.uu.dtype),
                self._failures,
                self._without,
            ]
        ).tolist()
        out = dict(
            zip(
                ("update_norm", "grad_norm", "cos_update_grad", "clip_scale", "clip_events"),
                figures[:5],
                strict=True,
            )
        )
        bad = figures[5] > 0
        out["skipped_steps"] = float(self.skipped + bad)
        out["consecutive_skips"] = float(self.consecutive_skips + 1 if bad else 0)
        out["tau"] = value(self.clipping.tau, max(self.steps - 1, 0))
        if self.clipping.adaptive is not None:
            out["tau"] = float(self._tau)
        if self.trust is not None:
            out["damping_factor"], out["reduction_ratio"] = self.trust.factor, self.trust.ratio
        if self.method is not None:
            out.update(self.method.health())
            out["factor_failures"], out["layers_without_factors"] = figures[6:]
        return out

    def state_bytes(self) -> int:
        """Bytes of moments, and of the method's state, on this rank."""
        own = sum(
            t.numel() * t.element_size()
            for s in self.state.values()
            for t in s.values()
            if isinstance(t, Tensor)
        )
        return own + (self.method.state_bytes() if self.method is not None else 0)

    def views(self, spans: Iterable[Span]) -> Iterator[tuple[str, Span, Tensor]]:
        """Where weights and moments lie: `(kind, span, 1-D view)`; only moments that the parameter's rule keeps.

        Args:
            spans: of this rank, or parts of them.
        """
        for span in spans:
            buffer = self._buffers[span.buffer]
            state = self.state[buffer]
            for kind in ("weight", *self.rules[span.name].moments):
                whole = buffer.detach() if kind == "weight" else state[kind]
                yield kind, span, self._flat(whole).narrow(0, span.offset, span.numel)

    def extra_state(self) -> dict[str, Any]:
        """Host-side state, the same on all ranks but for what the method says of the blocks that a rank owns."""
        return {
            "steps": self.steps,
            "base_steps": float(self.state[self._buffers[0]]["step"].item()),
            "skipped": self.skipped,
            "consecutive_skips": self.consecutive_skips,
            "retry": self._retry,
            "outcome": self._outcome.peek(),
            "clip_events": float(self._clip_events.item()),
            "failures": float(self._failures.item()),
            "norms": None if self.clipping.adaptive is None else self.clipping.adaptive.state(),
            "trust": None if self.trust is None else self.trust.state(),
            "method": None if self.method is None else self.method.counters(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `extra_state` returned, the parts of all ranks put together by `merge_extra_states`."""
        self.steps = int(state["steps"])
        for buffer in self._buffers:
            self.state[buffer]["step"].fill_(float(state["base_steps"]))
        self.skipped = int(state["skipped"])
        self.consecutive_skips = int(state["consecutive_skips"])
        self._retry = bool(state["retry"])
        self._clip_events.fill_(float(state["clip_events"]))
        self._failures = torch.full_like(self._clip_events, float(state["failures"]))
        if self.clipping.adaptive is not None:
            self.clipping.adaptive.load(state.get("norms"))
        if self.trust is not None:
            self.trust.load(state.get("trust"))
        if state["outcome"] is not None:
            self._outcome.push(torch.tensor(state["outcome"]))
        if self.method is not None and state["method"] is not None:
            self.method.load_counters(state["method"])


def merge_extra_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One `extra_state` from those of all ranks: what is common from the first, owned blocks from their owners.

    Args:
        states: in rank order, of however many ranks there were.
    """
    merged = dict(states[0])
    methods = [state["method"] for state in states if state["method"] is not None]
    if methods:
        owned = {name: block for method in methods for name, block in method["owned"].items()}
        merged["method"] = {"common": methods[0]["common"], "owned": owned}
    return merged
