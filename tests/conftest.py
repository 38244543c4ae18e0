"""What every test gets: the `--slow` flag, seeds, one thread, counted skips, no process left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: many small processes on few cores are fastest with a thread each, and no
# test may wait for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import pytest
import torch

from dsso.linalg import triangle

ROOT = Path(__file__).resolve().parents[1]
_MARK = "DSSO_TEST_SESSION"
"""Environment variable that marks every process started by this session, however deep."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes as well")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_session] = os.environ[_MARK] = uuid.uuid4().hex


_session: pytest.StashKey[str] = pytest.StashKey()
_leftover: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        # Markers, not keywords: a folder may have the name of one.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data_root() -> Path:
    """Directory with the real data sets; skips where there is none."""
    value = os.environ.get("DSSO_DATA")
    if not value:
        pytest.skip("DSSO_DATA is not set")
    if not Path(value).is_dir():
        pytest.skip("DSSO_DATA is not a directory")
    return Path(value)


@pytest.fixture
def forbid_host_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on asking a tensor for its value on the host raises an `AssertionError`.

    `dsso.parallel.deferred` alone may: it reads what was asked for a step earlier.
    """
    lookup, read = torch.Tensor.__getitem__, torch.Tensor.tolist

    def forbidden(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("host synchronization in a step")

    def tolist(self: torch.Tensor) -> Any:
        if Path(sys._getframe(1).f_code.co_filename).name != "deferred.py":
            raise AssertionError("host synchronization in a step")
        return read(self)

    def getitem(self: torch.Tensor, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts):
            raise AssertionError("host synchronization in a step")
        return lookup(self, index)

    def begin() -> None:
        # What a CPU may ask is not what is tested here.
        monkeypatch.setattr(triangle, "asking_is_free", lambda flag: False)
        for name in ("item", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, forbidden)
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        monkeypatch.setattr(torch.Tensor, "__getitem__", getitem)

    return begin


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command() -> Command:
    """`command(argv, timeout=…, env=…, cwd=…)` runs a program whose process group ends with the call."""

    def run(
        argv: Sequence[str | Path],
        timeout: float = 240.0,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in argv]
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            # The group, not the process: launchers leave their workers behind when they are killed alone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    return run


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Living processes of this session other than this one."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(_MARK) == mark:
                yield process
        except (psutil.Error, OSError):
            continue


def pytest_sessionfinish(session: pytest.Session) -> None:
    mark = session.config.stash[_session]
    # A test that runs pytest itself gave that run a mark of its own: only what this session started is ended.
    found: list[str] = []
    for process in _marked(mark):
        try:
            name = " ".join(process.cmdline())[:100]
            process.kill()
        except psutil.Error:
            continue
        # multiprocessing's helpers end with the session by themselves
        if "resource_tracker" not in name and "forkserver" not in name:
            found.append(f"{process.pid} {name}")
    session.config.stash[_leftover] = found


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for line in config.stash.get(_leftover, []):
        terminalreporter.write_line(f"left over and killed: {line}", yellow=True)
    told = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common())
    terminalreporter.write_line(f"skips: {sum(reasons.values())}" + (f" ({told})" if told else ""))
