"""A profile of some steps by `torch.profiler`: a trace a rank, and a table of time by phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dsso.phases import PHASES, PREFIX
from dsso.results import text_table
from launch.arguments import Steps

FOLDER = "profile"
"""Of the traces, in the output directory."""


class Profile:
    """Profiles some steps of a run on this rank.

    Args:
        steps: which; None: none, and nothing is done.
        directory: output directory of the run.
        rank: this process.
    """

    def __init__(self, steps: Steps | None, directory: Path, rank: int) -> None:
        self._steps = steps
        self._directory = directory
        self._rank = rank
        self._profiler: profile | None = None
        self._step: record_function | None = None
        self._taken = 0

    def begin(self, step: int) -> None:
        """A step is about to be taken.

        Args:
            step: its number, from 1.
        """
        steps = self._steps
        if steps is None or not steps.first <= step <= steps.last:
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()
        self._step = record_function(f"{PREFIX}step {step}")
        self._step.__enter__()  # type: ignore[no-untyped-call]

    def end(self, step: int) -> bool:
        """A step has been taken.

        Args:
            step: its number, from 1.

        Returns:
            Whether it was the last that is profiled: `close` writes the trace.
        """
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
            self._taken += 1
        return self._steps is not None and self._profiler is not None and step >= self._steps.last

    def close(self) -> str | None:
        """End the profile and write the trace, also where the run ends before its last step.

        Returns:
            What to tell, when a trace has been written.
        """
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._directory / FOLDER / f"rank{self._rank}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            where = f"traces: {path.parent}/rank*.json.gz (ui.perfetto.dev or chrome://tracing opens them)"
        except (OSError, RuntimeError) as error:  # torch's writer tells a full disk as the latter
            where = f"warning: {path} could not be written ({error})"
        return f"{table(_figures(profiler), self._taken)}\n{where}"


@dataclass
class _Time:
    calls: int = 0
    host: float = 0.0
    device: float = 0.0


def _figures(profiler: profile) -> dict[str, _Time]:
    """Times by name of a phase, in microseconds; `step` for whole steps."""
    found: dict[str, _Time] = {}
    events = profiler.events() or []  # type: ignore[no-untyped-call]
    for event in _ours(events):
        name = event.name.removeprefix(PREFIX)
        one = found.setdefault("step" if name.startswith("step ") else name, _Time())
        # The profiler shows what runs on a GPU as an event of the same name there.
        if event.device_type == DeviceType.CPU:
            one.calls += 1
            one.host += event.cpu_time_total
        else:
            one.device += event.device_time_total
    return found


def _ours(events: Sequence[Any]) -> Iterator[Any]:
    return (event for event in events if event.name.startswith(PREFIX))


def table(found: Mapping[str, _Time], steps: int) -> str:
    """Time by phase as text.

    Args:
        found: from the profiler.
        steps: that were profiled.
    """
    whole = found.get("step", _Time()).host or 1.0
    on_device = any(one.device for one in found.values())
    rows = [["phase", "calls/step", "ms/step", "share", *(["GPU ms/step"] if on_device else [])]]
    names = [name for name in PHASES if name in found]
    for name in [*names, "step"]:
        one = found.get(name, _Time())
        row = [
            "whole step" if name == "step" else name,
            f"{one.calls / max(1, steps):.1f}",
            f"{one.host / 1e3 / max(1, steps):.2f}",
            f"{one.host / whole:.1%}",
        ]
        rows.append([*row, *([f"{one.device / 1e3 / max(1, steps):.2f}"] if on_device else [])])
    return (
        f"profile of {steps} step{'' if steps == 1 else 's'} on this rank (host time, profiler included; the rest of a"
        f" step is the model's own passes)\n{text_table(rows)}"
    )
