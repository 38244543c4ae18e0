"""When which factor is measured and factorized, with which damping, and what happens when that fails.

Measurements and factorizations are spread over their intervals, so that no step is much longer than another: every
factor has a slot in the interval, given by its cost alone, so the schedule is the same on any number of ranks.

A factorization may run in the background, on a thread of its own (on a GPU: a stream of its own), and is then taken
over exactly `delay` steps later on every rank, finished or waited for, so a run does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsso.linalg import kron
from dsso.linalg.kron import DampingMode
from dsso.optim._factor import Factor, Job, means
from dsso.optim._statistics import send_factorizations
from dsso.parallel import collectives
from dsso.parallel.deferred import Deferred
from dsso.parallel.placement import Placement, slots
from dsso.phases import phased
from dsso.schedule import Interval

JITTERS = (1e-6, 1e-4, 1e-2)
"""Relative jitter of the attempts, in fp64, after a factorization failed."""


class Stagger:
    """Which factors are due on a step.

    Args:
        costs: of every factor, by key.
        spread: give every factor a slot of its own in the interval; else all are due at its first step.
    """

    def __init__(self, costs: Mapping[str, float], spread: bool) -> None:
        self._costs = dict(costs)
        self._spread = spread
        self._slots: dict[int, dict[str, int]] = {}

    def due(self, interval: Interval, step: int) -> list[str]:
        """Keys that are due on `step`, in the order of `costs`."""
        start, every = interval.segment(step)
        if every is None:
            return []
        turn = (step - start) % every
        if not self._spread or every == 1:
            return list(self._costs) if turn == 0 else []
        if every not in self._slots:
            found = slots(list(self._costs.values()), every)
            self._slots[every] = dict(zip(self._costs, found, strict=True))
        return [key for key, slot in self._slots[every].items() if slot == turn]


@dataclass
class _Pending:
    """A factorization that is under way or waits to be taken over."""

    key: str
    due: int
    usable: Tensor
    found: Future[list[list[Tensor]]]
    # What it works on must not be given back while a side stream still reads it.
    jobs: Sequence[Job] = ()


class Refresh:
    """Factorizes the factors that this rank owns, and brings them to those who apply them.

    Args:
        placement: of all factors.
        factors: those that this rank keeps, by key.
        pairs: for every layer its factors' keys, (A, G or None).
        rank: this rank.
        like: gives device and dtype.
        mode: of the damping.
        delay: steps between a factorization and its use; 0: at once.
    """

    def __init__(
        self,
        placement: Placement,
        factors: Mapping[str, Factor],
        pairs: Sequence[tuple[str, str | None]],
        rank: int,
        like: Tensor,
        mode: DampingMode,
        delay: int,
    ) -> None:
        self._placement = placement
        self._factors = factors
        self._rank = rank
        self._like = like
        self._mode = mode
        self._delay = delay
        self._partners: dict[str, list[tuple[str, str | None]]] = {}
        for pair in pairs:
            if not all(key is None or key in factors for key in pair):
                continue  # of a unit that was cut, another rank has the other half of this pair
            for key in pair:
                if key is not None:
                    self._partners.setdefault(key, []).append(pair)
        self._owned = [key for key, ranks in placement.factor_owners.items() if rank in ranks]
        # Pairs of the layers whose first owner this is: each layer is counted once over all ranks.
        counted = [layer for layer in placement.layers if placement.owner[layer.name] == rank]
        sides = {dims.key: dims.side for layer in counted for dims in (layer.a, layer.g) if dims}
        self._counted = [factors[key] for key in sides]
        self._counted_sides = torch.tensor(list(sides.values()), dtype=like.dtype, device=like.device)
        place = {key: index for index, key in enumerate(sides)}
        self._counted_a, self._counted_g = (
            # Behind the means of all factors stands that of the identity.
            torch.tensor(
                [place[d.key] if d else len(place) for d in dims], dtype=torch.int64, device=like.device
            )
            for dims in ([layer.a for layer in counted], [layer.g for layer in counted])
        )
        self._applied_elsewhere = any(
            user != source for users in placement.sources.values() for user, source in users.items()
        )
        self._outcome = Deferred()
        self._outcome_keys: list[str] = []
        self._pending: list[_Pending] = []
        self._coming: dict[int, list[str]] = {}
        self._workers = ThreadPoolExecutor(1, "dsso-factorize") if delay else None
        self._stream = torch.cuda.Stream(like.device) if delay and like.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._shifts: dict[str, Tensor] = {}
        # Of all factors that this rank hears of: whether a retry is due must be the same decision on every rank.
        self._attempts: dict[str, int] = {}
        self._failed = like.new_zeros(())
        self.damping = 0.0

    # -- curvature and damping ----------------------------------------------------------------------------------

    def _means(self, pair: tuple[str, str | None]) -> tuple[Tensor, Tensor]:
        mean_a = self._factors[pair[0]].mean()
        return mean_a, torch.ones_like(mean_a) if pair[1] is None else self._factors[pair[1]].mean()

    def _floor(self, multiple: float) -> Tensor:
        """That multiple of the mean over all layers of the product of the factors' mean eigenvalues; collective."""
        total = self._like.new_zeros(1)
        if self._counted:
            mean_F = torch.cat([means(self._counted, self._counted_sides), torch.ones_like(total)])
            total = (mean_F[self._counted_a] * mean_F[self._counted_g]).sum(dim=0, keepdim=True)
        return multiple * collectives.all_sum(total)[0] / len(self._placement.layers)

    def _shift(self, key: str, damping: float, floor: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the diagonal of a factor, and whether it is usable."""
        pair = self._partners[key][0]
        mean_a, mean_g = self._means(pair)
        split = kron.split_damping(mean_a, mean_g, damping, self._mode, floor)
        if key == pair[0]:
            # One A serves several G: it is as good as its own measurement.
            return split.lambda_a, (mean_a > kron.TINY) & torch.isfinite(mean_a)
        return split.lambda_g, split.usable

    # -- factorization ------------------------------------------------------------------------------------------

    @phased("factorize")
    def run(self, keys: Collection[str], step: int, damping: float, floor: float) -> None:
        """Factorize what is due, retry what failed a step ago, take over what is ready; collective.

        Args:
            keys: due factors, the same on every rank.
            step: number of the optimizer step.
            damping: c or lambda.
            floor: multiple of the mean curvature.
        """
        again = self._failed_before()
        flags: dict[str, Tensor] = {}
        if keys:
            self.damping = damping
            level = self._floor(floor) if self._mode == "relative" and floor else self._like.new_zeros(())
            for key in keys:
                self._attempts[key] = 0
                if key in self._factors:
                    self._factors[key].refreshed_at = step
                if key in self._owned:
                    shift, usable = self._shift(key, damping, level)
                    self._shifts[key] = shift
                    if self._workers is None:
                        # One after another: no more than one result waits in memory.
                        flags[key] = self._factors[key].keep(self._now(key, shift), usable)
                    else:
                        jobs = self._factors[key].jobs(shift)
                        self._pending.append(
                            _Pending(key, step + self._delay, usable, self._later(jobs), jobs)
                        )
            self._coming.setdefault(step + self._delay, []).extend(keys)
        fresh = self._coming.pop(step, [])
        flags |= self._take_over(step)
        for key in again:
            if key in fresh:
                continue  # a later measurement has been factorized meanwhile
            jitter = JITTERS[self._attempts.get(key, 0)]
            self._attempts[key] = self._attempts.get(key, 0) + 1
            if key in self._owned:
                factor = self._factors[key]
                found = self._now(key, self._shifts[key], jitter, torch.float64)
                flags[key] = factor.keep(found, torch.ones_like(factor.ready))
        self._count(flags)
        self._report([*fresh, *again], flags)
        if self._applied_elsewhere:
            # What failed is sent as well, so that all appliers of a layer use the same at any time.
            routes = sorted({*fresh, *again})
            send_factorizations(
                routes,
                self._placement.sources,
                self._factors,
                self._rank,
                self._placement.world_size,
                self._like,
            )

    def _count(self, flags: Mapping[str, Tensor]) -> None:
        """Failures of this step, each factor counted by the first of its owners."""
        mine = [flag for key, flag in flags.items() if self._placement.factor_owners[key][0] == self._rank]
        self._failed = torch.stack(mine).sum().to(self._like.dtype) if mine else self._like.new_zeros(())

    @property
    def failed(self) -> Tensor:
        """Factorizations that failed in this step, a scalar tensor; summed over ranks each factor counts once."""
        return self._failed

    def _report(self, keys: Sequence[str], flags: Mapping[str, Tensor]) -> None:
        """Have the failures read a step later: this rank's, or all ranks' where a retry must be sent to others."""
        if self._applied_elsewhere:
            keys = sorted(set(keys))
            if keys:
                none = torch.zeros((), dtype=torch.bool, device=self._like.device)
                values = torch.stack([flags.get(key, none) for key in keys]).to(self._like.dtype)
                self._outcome_keys = list(keys)
                self._outcome.push(collectives.all_sum(values).to(torch.float32))
        elif flags:
            self._outcome_keys = list(flags)
            self._outcome.push(torch.stack(list(flags.values())).to(torch.float32))

    def _now(
        self, key: str, shift: Tensor, jitter: float = 0.0, dtype: torch.dtype | None = None
    ) -> list[list[Tensor]]:
        return [job() for job in self._factors[key].jobs(shift, jitter, dtype)]

    def _later(self, jobs: Sequence[Job]) -> Future[list[list[Tensor]]]:
        """The factorization, on the background thread, of what the factor was when the jobs were made."""
        assert self._workers is not None
        if self._stream is None:
            return self._workers.submit(lambda: [job() for job in jobs])
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return self._workers.submit(self._on_stream, jobs, copied)

    def _on_stream(self, jobs: Sequence[Job], copied: Any) -> list[list[Tensor]]:
        """Run the jobs on the side stream, after the copies that they work on."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(copied)
            return [job() for job in jobs]

    def _take_over(self, step: int) -> dict[str, Tensor]:
        """Keep the factorizations whose time has come; whether each of them failed."""
        ready = [one for one in self._pending if one.due <= step]
        self._pending = [one for one in self._pending if one.due > step]
        flags = {}
        for one in ready:
            found = self._finished(one)
            flags[one.key] = self._factors[one.key].keep(found, one.usable)
        return flags

    def _finished(self, one: _Pending) -> list[list[Tensor]]:
        """What the job found; the main stream waits for the side stream, which has only been told to make it."""
        found = one.found.result()
        if self._stream is not None:
            main = torch.cuda.current_stream(self._like.device)
            main.wait_stream(self._stream)
            for tensor in (t for block in found for t in block):
                tensor.record_stream(main)
        return found

    def _failed_before(self) -> list[str]:
        """Factors whose last attempt failed a step ago and that may be tried again."""
        flags = self._outcome.pop()
        if flags is None:
            return []
        again = []
        for flag, key in zip(flags, self._outcome_keys, strict=True):
            if flag and self._attempts.get(key, 0) < len(JITTERS):
                again.append(key)
        return again

    # -- state --------------------------------------------------------------------------------------------------

    def age(self, step: int) -> int:
        """Steps since the oldest factorization in use was due; -1 while there is none."""
        found = [f.refreshed_at for f in self._factors.values()]
        known = [at for at in found if at is not None]
        return step - min(known) if known and len(known) == len(found) else -1

    def state_tensors(self) -> dict[str, Tensor]:
        """Factorizations that wait to be taken over; waits for those under way."""
        out = {}
        for one in self._pending:
            # A factor may have several under way: a repeated measurement does not wait for the one before.
            name = f"{one.key}/pending/{one.due}"
            out[f"{name}/usable"] = one.usable
            for block, found in enumerate(self._finished(one)):
                out |= {f"{name}/{block}/{i}": tensor for i, tensor in enumerate(found)}
        return out

    def counters(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Host-side state: what is the same on every rank, and by factor what only its owner knows."""
        failed = dict(zip(self._outcome_keys, self._outcome.peek() or [], strict=False))
        common = {
            "damping": self.damping,
            "coming": {str(step): keys for step, keys in self._coming.items()},
        }
        pending: dict[str, list[int]] = {}
        for one in self._pending:
            pending.setdefault(one.key, []).append(one.due)
        owned = {
            key: {
                "refreshed_at": self._factors[key].refreshed_at,
                "attempt": self._attempts.get(key, 0),
                "failed": failed.get(key, 0.0),
                "shift": float(self._shifts[key].item()) if key in self._shifts else None,
                "pending": pending.get(key, []),
            }
            for key in self._owned
        }
        return common, owned

    def load(
        self, common: Mapping[str, Any], owned: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
    ) -> None:
        """Take over what `counters` and `state_tensors` gave, of the factors that this rank keeps now.

        Args:
            common: the same on every rank.
            owned: of all ranks together.
            tensors: those of pending factorizations, by name.
        """
        self.damping = float(common["damping"])
        self._coming = {int(step): list(keys) for step, keys in common["coming"].items()}
        self._pending = []
        flags: dict[str, Tensor] = {}
        device = self._like.device
        self._attempts = {key: int(one["attempt"]) for key, one in owned.items()}
        for key, factor in self._factors.items():
            found = owned[key]
            factor.refreshed_at = found["refreshed_at"]
            if found["shift"] is not None:
                self._shifts[key] = self._like.new_tensor(found["shift"])
            flags[key] = torch.tensor(found["failed"])
            for due in found["pending"] if key in self._owned else []:
                name = f"{key}/pending/{due}"
                future: Future[list[list[Tensor]]] = Future()
                future.set_result(
                    [
                        [tensors[f"{name}/{block}/{i}"].to(device) for i in range(kept.parts)]
                        for block, kept in enumerate(factor.blocks)
                    ]
                )
                usable = tensors[f"{name}/usable"].to(device)
                self._pending.append(_Pending(key, int(due), usable, future))
        self._pending.sort(key=lambda one: one.due)
        if self._applied_elsewhere:
            flags = {key: torch.tensor(one["failed"]) for key, one in sorted(owned.items())}
        if any(bool(flag) for flag in flags.values()):
            self._outcome_keys = list(flags)
            self._outcome.push(torch.stack(list(flags.values())))

    def close(self) -> None:
        """End the background thread."""
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)
