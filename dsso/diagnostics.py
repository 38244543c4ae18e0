"""What a run tells: its files, the table at the start, and the two watchers that keep it honest.

Files of a run: `config.json` (what was asked for), `metrics.jsonl` (a line per logged step and per
evaluation), `summary.json` (how it ended). Watchers look at the figures of logging steps only, so they cost
no synchronization of their own: `NoopWatch` (a method whose step is the plain gradient says so) and
`SkipGuard` (a run that only skips steps ends with a message). `python -m dsso.diagnostics RUN` reads it all back
(`dsso.health`).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsso._version import __version__
from dsso.errors import RunError

NOOP_COSINE = 0.9999
"""Above this cosine between update and gradient a method changes the length of the step and nothing else."""
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "safetensors", "pydantic")
_ROWS_IN_FULL = 40


def jsonable(value: Any) -> Any:
    """The value with everything that JSON cannot hold replaced: NaN and infinities by null, paths by text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, torch.Tensor):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


class MetricsLog:
    """Appends lines to `metrics.jsonl`; each is there whole or not at all.

    A line that cannot be written (full disk) is kept and written before the next one.

    Args:
        path: the file; None writes nothing (ranks other than 0).
        step: the step that the run goes on from: lines after it are dropped, they will be written again.
        sync_every: lines after which to wait until the disk has them; None: never.

    Attributes:
        evaluated: steps of which the file has an evaluation already.
    """

    def __init__(self, path: Path | None, step: int = 0, sync_every: int | None = None) -> None:
        self.path = path
        self._sync_every, self._unsynced = sync_every, 0
        self._pending: list[bytes] = []
        self._warned = False
        self._handle = -1
        self.evaluated: set[int] = set()
        if path is None:
            return
        if path.exists():
            lines = list(_lines_until(path, step))
            self.evaluated = {line["step"] for line in map(json.loads, lines) if "eval" in line}
            kept = b"".join(lines)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            aside.write_bytes(kept)
            aside.replace(path)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **figures: Any) -> None:
        """Append one line."""
        if self._handle < 0:
            return
        self._pending.append((json.dumps(jsonable(figures), allow_nan=False) + "\n").encode())
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                print(
                    f"warning: {self.path} cannot be written now ({error}); lines are kept", file=sys.stderr
                )
            self._warned = True

    def close(self) -> None:
        """Write what is pending and close the file.

        Raises:
            RunError: lines are still pending.
        """
        if self._handle < 0:
            return
        try:
            self._flush()
        except OSError as error:
            raise RunError(
                f"{len(self._pending)} lines could not be written ({error})",
                where=str(self.path),
                remedy="make room on the disk and go on with --resume auto",
            ) from None
        finally:
            os.close(self._handle)
            self._handle = -1

    def _flush(self) -> None:
        while self._pending:
            line = self._pending[0]
            start = os.lseek(self._handle, 0, os.SEEK_END)
            try:
                if os.write(self._handle, line) != len(line):
                    raise OSError("only a part of a line fits")
            except OSError:
                os.ftruncate(self._handle, start)
                raise
            del self._pending[0]
            self._unsynced += 1
            if self._sync_every is not None and self._unsynced >= self._sync_every:
                os.fsync(self._handle)
                self._unsynced = 0


def _lines_until(path: Path, step: int) -> Iterable[bytes]:
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            figures = json.loads(line)
            tested = figures.get("eval", {}).get("split") == "test"  # the end is reached again
            if line.endswith(b"\n") and figures["step"] <= step and not tested:
                yield line
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # cut short when the run before ended


def environment() -> dict[str, Any]:
    """Versions, machine and command line of this process, for `config.json`."""
    versions = {"dsso": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": [sys.executable, *sys.argv],
        "directory": str(Path.cwd()),
        "versions": versions,
        "host": platform.node(),
        "platform": platform.platform(),
        "devices": devices or ["cpu"],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held: on its accelerator, or in RAM without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


class Pace:
    """What one rank did between two logged steps, without asking its device for anything that is not there yet.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._step = 0
        self._clock = self._busy = 0.0
        self._told_host = False

    def start(self, step: int) -> None:
        """Begin at a step."""
        self._step, self._clock, self._busy = step, time.monotonic(), time.thread_time()

    def figures(self, step: int, health: Mapping[str, float]) -> dict[str, Any]:
        """Figures of the steps since the last call; to be called behind the synchronization of a logging step.

        Args:
            step: steps taken.
            health: of this rank's engine.
        """
        steps, clock, busy = max(1, step - self._step), time.monotonic(), time.thread_time()
        found: dict[str, Any] = {
            "seconds": round((clock - self._clock) / steps, 6),
            # Ranks wait for each other in every step, so their clocks agree; what each computed itself, differs.
            "busy": round((busy - self._busy) / steps, 6),
            "bytes": peak_bytes(self.device),
        }
        if "factor_age" in health:
            found["factor_age"] = health["factor_age"]
        if not self._told_host:
            found["host"] = platform.node()
            self._told_host = True
        self._step, self._clock, self._busy = step, clock, busy
        return found


def ranks_entry(ranks: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Figures of all ranks for one line of `metrics.jsonl`: a list for each figure, in rank order.

    Args:
        ranks: what `Pace.figures` gave on each rank.
    """
    return {name: [one.get(name) for one in ranks] for name in ranks[0]}


def method_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table *parameter -> method -> owner* as text.

    Long tables are folded: parameters that differ in layer numbers only share a line. The whole table is in
    `config.json`.

    Args:
        rows: `parameter, shape, method, owner, reason`, as an engine gives them.
    """
    entries = [(str(row["parameter"]), _cells(row)) for row in rows]
    if len(entries) > _ROWS_IN_FULL:
        folded: dict[tuple[str, str, str, str], list[tuple[str, str]]] = {}
        for name, (shape, method, owner, reason) in entries:
            folded.setdefault((re.sub(r"\d+", "*", name), shape, method, reason), []).append((name, owner))
        entries = []
        for (pattern, shape, method, reason), members in folded.items():
            name = f"{pattern}  ({len(members)})" if len(members) > 1 else members[0][0]
            owners = ",".join(sorted({owner for _, owner in members}, key=lambda one: (len(one), one)))
            entries.append((name, (shape, method, owners, reason)))
    head = ("parameter", "shape", "method", "owner", "reason")
    lines = [head, *((name, *cells) for name, cells in entries)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    ]
    methods = Counter(str(row["method"]) for row in rows)
    text.append(", ".join(f"{method}: {count} parameters" for method, count in methods.most_common()))
    return "\n".join(text)


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    shape = row.get("shape")
    sides = (
        "x".join(str(side) for side in shape) if isinstance(shape, list | tuple | torch.Size) else str(shape)
    )
    owner = row.get("owner")
    return sides, str(row["method"]), "all" if owner is None else str(owner), str(row.get("reason") or "")


class NoopWatch:
    """Warns when a second-order method takes plain gradient steps.

    Args:
        window: so many steps in a row must be parallel to the gradient.
        method: name of the method, for the message.
        config: `optimizer.params`, for the explanation.
    """

    def __init__(self, window: int, method: str, config: Mapping[str, Any]) -> None:
        self.window = window
        self.method = method
        self.config = config
        self._since: int | None = None
        self._last = 0
        self._warned = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"since": self._since, "last": self._last, "warned": self._warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self._since, self._last, self._warned = state["since"], state["last"], state["warned"]

    def update(self, step: int, health: Mapping[str, float]) -> str | None:
        """Look at a logged step; the warning when a whole window was parallel, else None.

        It is told once per stretch of such steps.
        """
        cosine = health.get("cos_update_grad")
        # Steps of first order before those of the method are what was asked for.
        parallel = cosine is not None and cosine > NOOP_COSINE and step > self.config.get("warmup_steps", 0)
        if not parallel:
            self._since, self._warned = None, False
        elif self._since is None:
            # a figure stands for the steps since the one logged before it
            self._since = self._last
        self._last = step
        if self._since is None or self._warned or step - self._since < self.window:
            return None
        self._warned = True
        return (
            f"warning: {self.method} is doing nothing: since step {self._since} its update has been parallel"
            f" to the gradient (cos_update_grad {cosine:.6f} > {NOOP_COSINE} over {step - self._since} steps,"
            f" dsso.train.noop_window = {self.window}); this is gradient descent at the price of"
            f" {self.method}.\n"
            f"  why: {self._why(health)}"
        )

    def _why(self, health: Mapping[str, float]) -> str:
        reasons = []
        age = health.get("factor_age")
        if age is not None and (not math.isfinite(age) or age < 0):
            intervals = (
                "refresh_interval"
                if "refresh_interval" in self.config
                else "factor_interval and inverse_interval"
            )
            reasons.append(f"no curvature has been inverted yet: let {intervals} be due earlier")
        if self.config.get("start_step"):
            reasons.append(
                f"up to step {self.config['start_step']} (start_step) its steps are those of grafting alone"
            )
        if health.get("factor_failures", 0) > 0:
            reasons.append(f"{health['factor_failures']:.0f} factorizations failed")
        mode, damping = self.config.get("damping_mode"), health.get("damping")
        if damping is not None:
            kind = f"{mode} damping" if mode else "damping"
            reasons.append(
                f"most likely the {kind} of {damping:g} is too strong for this curvature: lower"
                " optimizer.params.damping"
                + (" or set damping_mode to 'relative'" if mode == "absolute" else " (1e-1 to 1e-3 is usual)")
            )
        elif "epsilon" in self.config:
            reasons.append(
                f"epsilon of {self.config['epsilon']:g} may be above what the second moments hold: lower it"
            )
        return (
            "; ".join(reasons)
            or "too strong a damping, or no parameter that the method takes (see the table)"
        )


class FlatWatch:
    """Notices when steps from losses alone stand still: every slope of many steps in a row is zero.

    Args:
        window: steps in a row that are worth a notice.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._streak = 0

    def update(self, step: int, measures: Sequence[Sequence[float]]) -> str | None:
        """Look at a step that was taken; a notice, once a streak, else None.

        Args:
            step: steps taken.
            measures: of the step; empty where it was skipped. The first figure of each is a slope.
        """
        flat = bool(measures) and not any(one[0] for one in measures)
        self._streak = self._streak + 1 if flat else 0
        if self._streak != self.window:
            return None
        return (
            f"warning: step {step}: all slopes of the last {self.window} steps were zero (dsso.train.noop_window ="
            f" {self.window}), so no weight has moved; raise optimizer.params.eps or the batch, or take a smoother"
            " objective"
        )


class SkipGuard:
    """Tells of skipped steps, and ends a run that skips one step after the other.

    Args:
        limit: `dsso.train.max_consecutive_skips`.
        dynamic_scale: fp16 with a dynamic loss scale, where skipping is how the scale is found.
    """

    def __init__(self, limit: int, dynamic_scale: bool = False) -> None:
        self.limit = limit
        self.dynamic_scale = dynamic_scale
        self._step = self._skipped = self._streak = 0

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"step": self._step, "skipped": self._skipped, "streak": self._streak}

    def restore(self, state: Mapping[str, int]) -> None:
        """Put back what `state` gave."""
        self._step, self._skipped, self._streak = state["step"], state["skipped"], state["streak"]

    def check(self, step: int, health: Mapping[str, float], bad_losses: Sequence[int]) -> str | None:
        """Look at a logged step; a notice when steps were skipped since the one before, else None.

        Args:
            step: steps taken.
            health: figures of the engine, the same on all ranks.
            bad_losses: per rank, micro-batches with a non-finite loss since the last logged step.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        total, steps = int(health.get("skipped_steps", 0)), step - self._step
        judged = "slopes" if "slope" in health else "gradients"
        new, self._skipped, self._step = total - self._skipped, total, step
        # some engines drop steps before the optimizer sees them: the total counts those as well
        streak = self._streak + steps if new >= steps else int(health.get("consecutive_skips", 0))
        self._streak = streak
        ranks = [f"rank {rank} ({count} micro-batches)" for rank, count in enumerate(bad_losses) if count]
        searching = self.dynamic_scale and health.get("loss_scale", 1.0) > 1.0
        if streak >= self.limit and not searching:
            source = (
                f"the loss was not finite on {', '.join(ranks)}"
                if ranks
                else f"the losses were finite, the {judged} were not"
                + (" (or above optimizer.params.skip_slope)" if judged == "slopes" else "")
            )
            raise RunError(
                f"{streak} steps in a row were skipped, the last is step {step} (first: {step - streak + 1});"
                f" since the last logged step {source}",
                where="dsso.train.max_consecutive_skips",
                got=self.limit,
                remedy="lower the learning rate, look at the data of these steps, or train in bf16 or fp32",
            )
        if new <= 0:
            return None
        bad = "a slope not finite or too large" if judged == "slopes" else "non-finite gradient"
        cause = f"non-finite loss on {', '.join(ranks)}" if ranks else bad
        if searching:
            cause = f"the loss scale is being found, now {health['loss_scale']:g}"
        return f"step {step}: {new} step(s) skipped on all ranks: {cause}; {total} in all"


if __name__ == "__main__":
    from dsso.health import main

    sys.exit(main())
