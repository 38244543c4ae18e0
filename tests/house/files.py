"""Which files belong to the project: what git tracks or would track, else what lies there."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def project_files() -> tuple[Path, ...]:
    """Text files of the project, ignored ones left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive
        skipped = {".venv", ".git", "__pycache__", "_build", "runs", "out", "build", "dist"}
        paths = [path for path in ROOT.rglob("*") if not skipped.intersection(path.relative_to(ROOT).parts)]
    return tuple(sorted(path for path in paths if path.is_file() and path.suffix not in {".png", ".pdf"}))


def python_files(*folders: str) -> list[Path]:
    """Python files below the given folders of the project."""
    return [
        path
        for path in project_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders
    ]


def short(path: Path) -> str:
    """The path as it is written in messages."""
    return path.relative_to(ROOT).as_posix()
