"""A new file in `dsso/optim/` is checked by the whole suite with no other edit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conformance import forward_methods, methods, table, test_forward_methods, test_methods

NEW = '''"""A method that somebody has just added: Shampoo by another name."""

from dsso.optim.shampoo import Blocks, Config
from dsso.optim._matrix import MatrixMethod

__all__ = ["Config", "Method"]


class Method(MatrixMethod):
    """On the matrices of a model."""

    block = Blocks
'''


NEW_FORWARD = '''"""A method that somebody has just added: MeZO by another name."""

from dsso.optim.mezo import Config, Method

__all__ = ["Config", "Method"]
'''


@pytest.mark.parametrize(("source", "suite"), [(NEW, test_methods), (NEW_FORWARD, test_forward_methods)])
def test_a_new_file_runs_all_of_it(command, tmp_path: Path, source: str, suite: ModuleType) -> None:  # type: ignore[no-untyped-def]
    package = tmp_path / "methods"
    package.mkdir()
    (package / "novel.py").write_text(source)
    # As if it lay in dsso/optim: the package looks into one more folder.
    (tmp_path / "as_if_there.py").write_text(
        f"import dsso.optim\ndsso.optim.__path__.append({str(package)!r})\n"
    )
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "as_if_there", "-p", "no:cacheprovider"]
    argv += [str(suite.__file__), "-k", "NOVEL"]
    done = command(argv, env={"PYTHONPATH": str(tmp_path)})
    ours = [name for name in vars(suite) if name.startswith("test_")]
    failed = re.findall(r"^FAILED \S+::(\w+)\[", done.stdout, re.M)
    # All that is missing is what cannot come by itself.
    assert failed == ["test_it_is_documented_and_has_recipes"], done.stdout
    count = re.search(r"1 failed, (\d+) passed", done.stdout)
    assert count is not None
    assert int(count[1]) >= len(ours) - 1


def test_the_methods_are_those_of_the_folder() -> None:
    folder = Path(methods.__file__).parents[2] / "dsso" / "optim"
    files = {file.stem.upper() for file in folder.glob("[a-z]*.py")} - {"BASE"}
    assert {*methods.METHODS, *forward_methods.METHODS} == files


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert table.main(["--only", "SHAMPOO", "--ranks"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == {"green": True, "worst": {"SHAMPOO": 0.0}}
    told = [line for line in printed if line.startswith("a step that is not finite changes nothing")]
    assert told
    assert "ok (3)" in told[0]
    # A check that fails, and a difference that is too large, are not green.
    monkeypatch.setattr(table, "checks", lambda methods: ([["check", *methods], ["x", "FAILED"]], False))
    assert table.main(["--only", "SHAMPOO", "--ranks"]) == 1
    monkeypatch.setattr(table, "checks", lambda methods: ([["check", *methods], ["x", "ok (1)"]], True))
    monkeypatch.setattr(table, "engines", lambda methods, ranks: {"SHAMPOO": {"ddp W=2": 2e-5}})
    assert table.main(["--only", "SHAMPOO"]) == 1


@pytest.mark.slow
@pytest.mark.dist
def test_the_table_of_methods_from_forward_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--only", "HIZOO", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    last = json.loads(printed[-1])
    assert last["green"]
    assert 0 <= last["worst"]["HIZOO"] <= 1e-5
    told = [line for line in printed if re.match(r"(replica|fsdp2|zero3) W=2, (loss|weights)", line)]
    assert len(told) == 6
    assert any(line.startswith("steps of no length change no bit") and "ok (" in line for line in printed)


@pytest.mark.parametrize(
    ("loss", "weights", "green"), [(1e-7, 0.0, True), (2e-6, 0.0, False), (0.0, 2e-5, False)]
)
def test_courses_that_are_not_green(
    loss: float,
    weights: float,
    green: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = {"method": "HIZOO", "engine": "zero3", "ranks": 2, "loss": loss, "weights": weights}
    monkeypatch.setattr(table, "checks", lambda methods, file: ([["check", *methods], ["x", "ok (1)"]], True))
    monkeypatch.setattr(table, "forward_engines", lambda methods, ranks: [line])
    assert table.main(["--only", "HIZOO"]) == (0 if green else 1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "green": green,
        "worst": {"HIZOO": weights},
    }
