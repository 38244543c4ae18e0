"""Whenever a process is killed, the newest checkpoint that was whole is found again, with what was written in it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsso import checkpoint
from dsso.checkpoint import Checkpointer
from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.optim.kfac import Config

FORK = multiprocessing.get_context("fork")
KILLS = 20


def engine() -> SingleEngine:
    """Some weights, momenta and factors."""
    model = nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 10))
    cpu = torch.device("cpu")
    return SingleEngine(model, make_optimizer(model, "KFAC", Config(), cpu), cpu, 1, 1)


def fill(made: SingleEngine, value: float) -> None:
    """All tensors of that value, which is the step: a mixture of two steps would show."""
    with torch.no_grad():
        for _, _, view in made.optimizer.views(made.optimizer.table.ranks[0]):
            view.fill_(value)
        for tensor in made.optimizer.method.state_tensors().values():  # type: ignore[union-attr]
            if tensor.is_floating_point():
                tensor.fill_(value)


def values(made: SingleEngine) -> set[float]:
    """All different numbers in the state."""
    tensors = [view for _, _, view in made.optimizer.views(made.optimizer.table.ranks[0])]
    state = made.optimizer.method.state_tensors().values()  # type: ignore[union-attr]
    tensors += [tensor for tensor in state if tensor.is_floating_point()]
    return {float(x) for tensor in tensors for x in tensor.unique()}


def save(keeper: Checkpointer, made: SingleEngine, step: int) -> None:
    """A checkpoint of step `step`."""
    fill(made, float(step))
    keeper.save(made, step, {"step": step}, {"own": torch.tensor(step)})


def check(directory: Path, least: int) -> int:
    """The step of the newest checkpoint, after reading it; it is `least` or a later one."""
    good, _ = checkpoint.find(directory)
    chosen, skipped = checkpoint.newest(good)
    assert chosen is not None, "nothing is left"
    assert not skipped, skipped
    assert chosen.step >= least, f"step {least} was written, the newest is {chosen}"
    made = engine()
    state, ranks = Checkpointer(directory, 1).load(made, chosen)
    assert state == {"step": chosen.step}
    assert [int(own["own"]) for own in ranks] == [chosen.step] * chosen.world_size
    assert values(made) == {float(chosen.step)}
    return chosen.step


def killed(target: Callable[..., None], *arguments: Any, after: float) -> int:
    """Run `target(pipe, …)` in a process of its own, kill it; the last number that it sent (0: none)."""
    reader, writer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=target, args=(writer, *arguments))
    process.start()
    writer.close()
    assert reader.poll(60)
    last = int(reader.recv())  # it is under way
    time.sleep(after)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    try:
        while reader.poll(0):
            last = int(reader.recv())
    except EOFError:
        pass
    return last


def endless(pipe: Any, directory: Path, first: int, keep_last: int) -> None:
    """Save step after step, each of them twice: the second replaces the first."""
    torch.set_num_threads(1)
    keeper, made = Checkpointer(directory, keep_last), engine()
    pipe.send(first)
    for step in range(first + 1, first + 10_000):
        for _ in range(2):
            save(keeper, made, step)
            pipe.send(step)


def seconds_of_a_save(directory: Path) -> float:
    """Write step 1, and tell how long a save takes here, now that all is warm."""
    made, seconds = engine(), 0.0
    for _ in range(3):
        begun = time.monotonic()
        save(Checkpointer(directory, 1), made, 1)
        seconds = time.monotonic() - begun
    return min(seconds, 0.2)


@pytest.mark.parametrize("keep_last", [1, 3])
def test_killed_at_random_moments(tmp_path: Path, keep_last: int) -> None:
    chance, reached = random.Random(keep_last), 1
    pace = seconds_of_a_save(tmp_path)
    kills = KILLS if keep_last == 1 else KILLS // 4
    for _ in range(kills):
        told = killed(endless, tmp_path, reached, keep_last, after=chance.uniform(0.0, 6 * pace))
        reached = check(tmp_path, told)
    assert reached > kills / 2, "hardly any was written: the kills prove nothing"
    # what crashes have left behind is gone after the next save
    save(Checkpointer(tmp_path, keep_last), engine(), reached + 1)
    names = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in names if name.startswith(".")]
    assert len(names) <= keep_last + 1


def dying(directory: Path, step: int, moment: int) -> None:
    """Save one step; end without a word at the given access to the file system."""
    keeper, made = Checkpointer(directory, 1), engine()
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event.startswith(("os.", "shutil.")) or (event == "open" and str(directory) in str(arguments[0])):
            seen += 1
            if seen == moment:
                os._exit(9)

    sys.addaudithook(hook)
    save(keeper, made, step)
    os._exit(0)


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_killed_at_every_call_that_opens_renames_or_removes(tmp_path: Path, again: bool) -> None:
    moment, status, found = 0, 9, set()
    save(Checkpointer(tmp_path, 1), engine(), 5)
    while status == 9:
        moment += 1
        process = FORK.Process(target=dying, args=(tmp_path, 5 if again else 6, moment))
        process.start()
        process.join(30)
        status = process.exitcode
        found.add(check(tmp_path, 5))
        if found == {5, 6}:  # from here on step 6 is in place: go back
            Checkpointer(tmp_path, 1).drop_after(5)
            if not list(tmp_path.glob("step_*")):
                save(Checkpointer(tmp_path, 1), engine(), 5)
            found = {5}
    assert status == 0
    assert moment > 30


def pair(pipe: Any, directory: Path, first: int, number: int, store: str) -> None:
    """One of two ranks that save together."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    endless(pipe, directory, first, 1)


@pytest.mark.slow
@pytest.mark.dist
def test_one_of_two_ranks_is_killed(tmp_path: Path) -> None:
    chance, directory, reached, turn = random.Random(2), tmp_path / "checkpoints", 1, 0
    pace = seconds_of_a_save(directory)
    # Where two ranks share a busy core a kill may come before their first save: more of them, within reason.
    while turn < KILLS or (reached <= KILLS / 2 and turn < 3 * KILLS):
        store = str(tmp_path / f"store{turn}")
        silent, far = FORK.Pipe(duplex=False)
        other = FORK.Process(target=pair, args=(far, directory, reached, 1 - turn % 2, store))
        other.start()
        told = killed(pair, directory, reached, turn % 2, store, after=chance.uniform(0.0, 9 * pace))
        other.join(30)  # it notices, and ends with an error
        assert other.exitcode not in (None, 0)
        silent.close()
        reached, turn = check(directory, told), turn + 1
    assert reached > KILLS / 2, "hardly any was written: the kills prove nothing"
