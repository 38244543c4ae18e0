"""Length, documentation, unfinished marks, and words that do not belong into a public project."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.house.files import ROOT, project_files, python_files, short

LONGEST = 500


def test_no_file_is_too_long() -> None:
    lengths = {
        short(path): len(path.read_text().splitlines()) for path in python_files("dsso", "launch", "tests")
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_no_file_is_empty() -> None:
    empty = {short(path) for path in project_files() if not path.stat().st_size}
    assert empty <= {"dsso/py.typed"}


def undocumented(source: str, path: str) -> list[str]:
    """Public modules, classes, functions, methods and configuration fields without a docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else [f"{path}: the module"]

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("_") or _is_overload(node):
                    continue
                if not ast.get_docstring(node):
                    found.append(f"{path}:{node.lineno}: {prefix}{node.name}")
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
                    if _is_model(node):
                        found.extend(f"{path}: {prefix}{node.name}.{name}" for name in _bare_fields(node))

    visit(tree.body, "")
    return found


def _is_overload(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return bool(names & {"overload", "setter"})


def _is_model(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).split(".")[-1] in {"StrictModel", "BaseModel"} for base in node.bases)


def _bare_fields(node: ast.ClassDef) -> list[str]:
    """Annotated fields that are not followed by a string."""
    after = [*node.body[1:], None]
    return [
        statement.target.id
        for statement, following in zip(node.body, after, strict=True)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
        and not (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        )
    ]


def test_every_public_name_is_documented() -> None:
    found = [
        line
        for path in python_files("dsso", "launch")
        if path.stat().st_size
        for line in undocumented(path.read_text(), short(path))
    ]
    assert not found, "\n".join(found)


def test_the_check_sees_missing_documentation() -> None:
    fields = '    x: int = 1\n    """X."""\n    y: int = 2\n'
    source = f'"""M."""\nclass A(StrictModel):\n    """A."""\n{fields}    def f(self): ...\n'
    assert undocumented(source, "m.py") == ["m.py:7: A.f", "m.py: A.y"]
    assert undocumented("x = 1", "m.py") == ["m.py: the module"]


UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|NotImplemented" r"Error\(\)|pass\s+# stub")

# Where packages come from is the user's configuration; and a path of one machine is of no use on another.
HOSTS = re.compile(
    r"(pypi\.(org|python)|pythonhosted\.org|download\.pytorch\.org|--(extra-)?index-url|--find-links|--trusted-host)"
)
MACHINES = re.compile(r"(?<![\w.}/])/(home|root|work|Users|mnt)/\w|\.\./(shared|steering)\b")


@pytest.mark.parametrize(
    ("pattern", "sample"),
    [
        pytest.param(UNFINISHED, "# TODO: later", id="unfinished"),
        pytest.param(HOSTS, "pip install --index-url x", id="package-hosts"),
        pytest.param(MACHINES, "open('/home/me/data')", id="machine-paths"),
    ],
)
def test_no_forbidden_text(pattern: re.Pattern[str], sample: str) -> None:
    assert pattern.search(sample)
    found = []
    for path in project_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{short(path)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path", [p for p in project_files() if p.suffix == ".sh" or p.parent.name == ".ci"], ids=short
)
def test_shell_scripts_parse(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_ci_runs_the_command_of_the_readme() -> None:
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text()
