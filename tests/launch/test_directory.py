"""The output directory is tried by every rank before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dsso.errors import RecipeError
from launch import directory
from launch.directory import open_directory
from launch.prepare import Job


def job(output_dir: Path, remove: Sequence[Path] = ()) -> Job:
    return cast("Job", SimpleNamespace(output_dir=output_dir, resume=SimpleNamespace(remove=remove)))


def told_by(monkeypatch: pytest.MonkeyPatch, *others: tuple[str, bool, str | None]) -> None:
    """Let other ranks have found this, beside what this process finds."""
    monkeypatch.setattr(directory, "gather_objects", lambda mine: [mine, *others])


def test_it_is_made_and_left_without_a_trace(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    open_directory(job(out))
    assert out.is_dir()
    assert not list(out.iterdir())


def test_a_run_that_is_overwritten_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    for name in ("metrics.jsonl", "summary.json", "notes.txt"):
        (tmp_path / name).touch()
    open_directory(job(tmp_path, [tmp_path / "checkpoints", tmp_path / "metrics.jsonl"]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_rank_that_cannot_write_is_named_with_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_by(monkeypatch, ("node-b", True, None), ("node-c", True, "[Errno 30] Read-only file system"))
    with pytest.raises(RecipeError, match=r"rank 2 on node-c cannot write there \(\[Errno 30\]"):
        open_directory(job(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_rank_that_sees_another_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told_by(monkeypatch, ("node-b", False, None))
    with pytest.raises(RecipeError, match=r"rank 1 on node-b does not see what rank 0 on .* writes there"):
        open_directory(job(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_this_rank_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "PATIENCE", 0.3)
    assert directory._look(tmp_path / "token") == (False, None)
    (tmp_path / "token").touch()
    assert directory._look(tmp_path / "token") == (True, None)

    def refused(**_: Any) -> Any:
        raise PermissionError(13, os.strerror(13), str(tmp_path))

    monkeypatch.setattr(directory.tempfile, "TemporaryFile", refused)
    seen, problem = directory._look(tmp_path / "token")
    assert seen
    assert problem is not None
    assert "Permission denied" in problem


def test_rank_0_is_named_with_its_own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the others, which are on other machines."""
    monkeypatch.setattr(directory, "problem_on_rank_0", lambda _: "[Errno 28] No space left on device")
    monkeypatch.setattr(
        directory, "broadcast_object", lambda mine: mine if mine.startswith(".seen") else "node-a"
    )
    with pytest.raises(RecipeError, match=r"rank 0 on node-a cannot write there \(\[Errno 28\]"):
        open_directory(job(tmp_path))
