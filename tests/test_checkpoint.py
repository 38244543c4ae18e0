"""Checkpoints are whole or do not exist, and what is wrong with one is said."""

from __future__ import annotations

import errno
import json
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsso import checkpoint
from dsso.checkpoint import Checkpointer, CheckpointError
from dsso.errors import RecipeError
from dsso.parallel.collectives import rank


class FakeEngine:
    """Writes one file a rank; fails on the ranks and steps that it is told."""

    def __init__(self, error: Exception | None = None, failing_rank: int = 0) -> None:
        self.error = error
        self.failing_rank = failing_rank
        self.payload = b"weights" * 100

    def save_checkpoint(self, save_dir: Path, tag: str, client_state: Mapping[str, Any]) -> None:
        folder = Path(save_dir) / tag
        (folder / f"engine_{rank()}.bin").write_bytes(self.payload)
        if self.error is not None and rank() == self.failing_rank:
            raise self.error
        (folder / f"state_{rank()}.json").write_text(json.dumps(client_state))

    def load_checkpoint(self, load_dir: Path, tag: str) -> dict[str, Any]:
        self.payload = (Path(load_dir) / tag / f"engine_{rank()}.bin").read_bytes()
        found: dict[str, Any] = json.loads((Path(load_dir) / tag / f"state_{rank()}.json").read_text())
        return found


def save(keeper: Checkpointer, step: int, engine: FakeEngine | None = None, **more: Any) -> Path:
    return keeper.save(engine or FakeEngine(), step, {"step": step}, {"own": torch.tensor(step)}, **more)


def tags(keeper: Checkpointer) -> list[str]:
    return sorted(path.name for path in keeper.directory.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path / "checkpoints", keep_last=2)
    path = save(keeper, 7, info={"best_step": 5})
    found, skipped = checkpoint.find(keeper.directory)
    assert (found[0].path, found[0].step, found[0].world_size, found[0].info) == (
        path,
        7,
        1,
        {"best_step": 5},
    )
    assert skipped == []
    engine = FakeEngine()
    engine.payload = b""
    state, (own,) = keeper.load(engine, found[0])
    assert (state, own["own"], engine.payload) == ({"step": 7}, 7, b"weights" * 100)
    assert (keeper.directory / "latest").read_text() == path.name


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4, 5):
        save(keeper, step, best_step=2 if step > 1 else None)
    assert tags(keeper) == ["latest", "step_00000002", "step_00000004", "step_00000005"]
    assert (tmp_path / "latest").read_text() == "step_00000005"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            lambda path: (path / "engine_0.bin").write_bytes(b"weights"),
            "engine_0.bin has 7 bytes instead of 700: it was cut short",
            id="truncated",
        ),
        pytest.param(lambda path: (path / "engine_0.bin").unlink(), "engine_0.bin is missing", id="missing"),
        pytest.param(
            lambda path: (path / "manifest.json").unlink(),
            "no manifest.json: writing it was cut short",
            id="unsealed",
        ),
        pytest.param(
            lambda path: (path / "manifest.json").write_text('{"format": 1, "st'),
            "cannot be read",
            id="half-manifest",
        ),
        pytest.param(
            lambda path: (path / "manifest.json").write_text('{"format": 9}'),
            "format 9 is not known",
            id="format",
        ),
        pytest.param(
            lambda path: (path / "engine_0.bin").write_bytes(b"Weights" * 100),
            "the content of engine_0.bin is not what was written",
            id="changed",
        ),
    ],
)
def test_the_one_before_a_damaged_one_is_used(tmp_path: Path, damage: Any, reason: str) -> None:
    keeper = Checkpointer(tmp_path, keep_last=3)
    save(keeper, 1)
    before = save(keeper, 2)
    newest = save(keeper, 3)
    damage(newest)
    good, skipped = checkpoint.find(tmp_path)
    chosen, changed = checkpoint.newest(good)
    assert chosen is not None and chosen.path == before
    (told,) = [*skipped, *changed]
    assert told.path == newest
    assert reason in told.reason


def test_without_any_good_one_there_is_none(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=3)
    (save(keeper, 1) / "engine_0.bin").write_bytes(b"x" * 700)
    chosen, skipped = checkpoint.newest(checkpoint.find(tmp_path)[0])
    assert chosen is None
    assert len(skipped) == 1
    assert checkpoint.find(tmp_path / "nowhere") == ([], [])


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=1)
    good = save(keeper, 1)
    full = FakeEngine(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="rank 0: the disk is full") as caught:
        save(keeper, 2, full)
    assert f"the last good one is {good}" in str(caught.value)
    assert "MB free" in str(caught.value)
    assert "remedy: make room" in str(caught.value)
    assert tags(keeper) == ["latest", "step_00000001"]
    assert checkpoint.newest(checkpoint.find(tmp_path)[0])[0] is not None
    # the next one is written as if nothing had been
    save(keeper, 3)
    assert tags(keeper) == ["latest", "step_00000003"]


_LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from tests.test_checkpoint import FakeEngine, save
from dsso.checkpoint import Checkpointer, CheckpointError, find, newest
keeper = Checkpointer(Path({directory!r}), keep_last=1)
save(keeper, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file of this process can grow beyond
engine = FakeEngine()
engine.save_checkpoint = lambda folder, tag, state: torch.save(torch.zeros(10_000), folder / tag / "big.pt")
try:
    save(keeper, 2, engine)
except CheckpointError as error:
    print("told:", error)
print("left:", newest(find(keeper.directory)[0])[0].step)
"""


def test_a_write_that_really_fails(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    script = _LIMITED.format(root=str(root), directory=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert "told:" in done.stdout and "step_00000002 could not be written (rank 0: " in done.stdout
    assert "left: 1" in done.stdout
    assert not list(tmp_path.glob(".writing-*"))


def test_a_crash_while_writing_leaves_nothing_half_valid(tmp_path: Path) -> None:
    class Crash(BaseException):
        pass

    keeper = Checkpointer(tmp_path, keep_last=1)
    save(keeper, 1)
    engine = FakeEngine()
    engine.error = Crash()  # type: ignore[assignment]
    with pytest.raises(Crash):
        save(keeper, 2, engine)
    assert ".writing-step_00000002" in tags(keeper)
    good, skipped = checkpoint.find(tmp_path)
    assert ([one.step for one in good], skipped) == ([1], [])
    save(keeper, 3)
    assert tags(keeper) == ["latest", "step_00000003"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=2)
    save(keeper, 1)
    engine = FakeEngine()
    engine.payload = b"new"
    save(keeper, 1, engine)
    assert tags(keeper) == ["latest", "step_00000001"]
    assert (tmp_path / "step_00000001" / "engine_0.bin").read_bytes() == b"new"
    assert len(checkpoint.find(tmp_path)[0]) == 1


def test_what_is_newer_is_dropped(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        save(keeper, step)
    keeper.drop_after(1)
    assert tags(keeper) == ["latest", "step_00000001"]
    assert (tmp_path / "latest").read_text() == "step_00000001"
    keeper.drop_after(0)
    assert tags(keeper) == []


def test_paths_that_a_user_may_give(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path / "checkpoints", keep_last=3)
    path = save(keeper, 1)
    assert checkpoint.locate(tmp_path) == keeper.directory
    assert checkpoint.locate(keeper.directory) == keeper.directory
    assert checkpoint.locate(path) == path
    with pytest.raises(RecipeError, match="--resume: no checkpoint is there") as caught:
        checkpoint.locate(tmp_path / "nothing")
    assert "allowed: auto, none, a run's output directory" in str(caught.value)


def test_random_numbers_go_on_where_they_were() -> None:
    state = checkpoint.rng_state()
    torch.save(state, buffer := __import__("io").BytesIO())

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), float(torch.rand(()))]

    first = draw()
    draw()
    buffer.seek(0)
    checkpoint.set_rng_state(torch.load(buffer, weights_only=True))
    assert draw() == first


def test_files_are_replaced_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def _two_ranks(number: int, directory: str, queue: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=number, world_size=2)
    keeper = Checkpointer(Path(directory) / "checkpoints", keep_last=2)
    save(keeper, 1)
    told = ""
    try:
        save(keeper, 2, FakeEngine(OSError(errno.ENOSPC, "No space left on device"), failing_rank=1))
    except CheckpointError as error:
        told = str(error)
    save(keeper, 3)
    good, _ = checkpoint.find(keeper.directory)
    if number == 1:  # what rank 0 sees counts
        good = []
    chosen, skipped = checkpoint.newest(good)
    assert chosen is not None
    _, (own,) = keeper.load(FakeEngine(), chosen)
    queue.put(
        (number, told, chosen.step, chosen.world_size, sorted(chosen.files), len(skipped), int(own["own"]))
    )
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_two_ranks, args=(n, str(tmp_path), queue)) for n in range(2)]
    for worker in workers:
        worker.start()
    found = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
    assert [one[0] for one in found] == [0, 1]
    for _, told, step, world_size, files, skipped, own in found:
        assert "(rank 1: the disk is full" in told
        assert (step, world_size, skipped, own) == (3, 2, 0, 3)
        assert files == [
            *(f"engine_{n}.bin" for n in range(2)),
            *(f"run/rank_0000{n}.pt" for n in range(2)),
            *(f"state_{n}.json" for n in range(2)),
        ]
