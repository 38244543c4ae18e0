"""`launch/env.sh` in a project of its own, with a python that writes down what pip is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.files import ROOT

_PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m pip" ]; then
    shift 3
    echo "$*" >>"{log}"
    case "$*" in {broken}) exit 1 ;; esac
    exit 0
fi
exec {real} "$@"
"""


class Project:
    """A copy of what `env.sh` reads, and an environment whose pip only keeps a log."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        (self.root / "launch").mkdir(parents=True)
        for name in ("launch/env.sh", "setup.cfg", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.env = folder / "env"
        self.log = folder / "log"
        (self.env / "bin").mkdir(parents=True)
        for tool in ("ninja", "g++"):
            self.program(tool, "#!/bin/bash\n")
        self.breaks("nothing-is-broken")

    def program(self, name: str, text: str) -> None:
        path = self.env / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def breaks(self, pattern: str) -> None:
        """Let pip fail for arguments that match."""
        self.program("python", _PYTHON.format(log=self.log, broken=pattern, real=sys.executable))

    def source(self, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail; source {self.root}/launch/env.sh; pwd"],
            cwd="/",
            env={**os.environ, "VIRTUAL_ENV": str(self.env), **env},
            capture_output=True,
            text=True,
            check=False,
        )

    def asked(self) -> list[str]:
        """What pip was asked for since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_torch_comes_first_and_everything_is_pinned(project: Project) -> None:
    done = project.source()
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == project.root
    asked = project.asked()
    assert asked[0].endswith("-c constraints.txt torch")
    assert any(line.endswith("-c constraints.txt -e .[dev]") for line in asked)
    installed = [line for line in asked if "torchvision" not in line]
    assert all("-c constraints.txt" in line or "--no-deps" in line for line in installed)


def test_the_second_time_nothing_is_installed(project: Project) -> None:
    assert project.source().returncode == 0
    project.asked()
    assert project.source().returncode == 0
    assert project.asked() == []


def test_changed_pins_are_installed(project: Project) -> None:
    project.source()
    project.asked()
    pins = project.root / "constraints.txt"
    pins.write_text(pins.read_text() + "\n# changed\n")
    assert project.source().returncode == 0
    assert project.asked() != []


def test_the_model_package_may_be_absent(project: Project) -> None:
    project.breaks("*minilm*")
    done = project.source()
    assert done.returncode == 0
    assert "minilm" in done.stderr


def test_a_torchvision_for_another_torch_is_removed(project: Project) -> None:
    broken = project.root / "torchvision.py"
    broken.write_text("raise RuntimeError('operator does not exist')\n")
    done = project.source(PYTHONPATH=str(project.root))
    assert done.returncode == 0
    assert any(line.endswith("-y torchvision") for line in project.asked())
    assert "removing torchvision" in done.stderr, "the user's own environment is not changed in silence"
    broken.write_text("")
    pins = project.root / "constraints.txt"
    pins.write_text(pins.read_text() + "\n# changed\n")
    assert project.source(PYTHONPATH=str(project.root)).returncode == 0
    assert not any("-y torchvision" in line for line in project.asked())


def test_a_failed_installation_stops_and_is_tried_again(project: Project) -> None:
    project.breaks("*.[[]dev]*")
    done = project.source()
    assert done.returncode != 0
    assert done.stdout == ""
    assert "could not install the packages" in done.stderr
    project.breaks("nothing-is-broken")
    project.asked()
    assert project.source().returncode == 0
    assert project.asked() != []


def without_compiler(project: Project, user: int) -> subprocess.CompletedProcess[str]:
    """Source the script on a machine without g++, as the given user."""
    (project.env / "bin" / "g++").unlink()
    for tool in ("bash", "cat", "cut", "dirname", "rm", "sha256sum"):
        (project.env / "bin" / tool).symlink_to(str(shutil.which(tool)))
    project.program("id", f"#!/bin/bash\necho {user}\n")
    project.program("apt-get", f'#!/bin/bash\necho "apt-get $*" >>"{project.log}"\n')
    return project.source(PATH=str(project.env / "bin"))


def test_a_missing_compiler_is_named(project: Project) -> None:
    done = without_compiler(project, user=1000)
    assert "sudo apt-get install g++" in done.stderr
    assert not any(line.startswith("apt-get") for line in project.asked())


def test_root_installs_a_missing_compiler(project: Project) -> None:
    without_compiler(project, user=0)
    commands = [line for line in project.asked() if line.startswith("apt-get")]
    assert commands[0].startswith("apt-get update")
    assert commands[1].split()[-1] == "g++"


def test_the_environment_of_the_project_is_to_be_activated(project: Project) -> None:
    """The reminder comes where `.venv` was made or found by the script, and not where the user has one active."""
    script = f"source {project.root}/launch/env.sh; dsso_remind"
    hint = "first: . .venv/bin/activate"
    own = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "CONDA_PREFIX"}}
    shutil.copytree(project.env, project.root / ".venv")
    for env, told in ((own, True), ({**own, "VIRTUAL_ENV": str(project.env)}, False)):
        words = ["bash", "-c", f"set -euo pipefail; {script}"]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (hint in done.stderr) == told
    assert "dsso_remind" in (ROOT / "launch" / "quickstart.sh").read_text().splitlines()[-1]
