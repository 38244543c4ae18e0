"""Imports point one way only, and some packages may be imported in one place only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.house.files import ROOT, python_files, short

LAYERS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "files", "phases", "linalg", "schedule", "config"),
    ("curvature", "parallel"),
    ("clip", "optim", "seedlog"),
    ("ds_keys", "recipe"),
    ("engines",),
    (
        "checkpoint",
        "inspect",
        "preempt",
        "job_time",
        "diagnostics",
        "health",
        "results",
        "plots",
        "plan",
        "recipe_docs",
        "replay",
        "seeding",
        "sweep",
        "tasks",
    ),
    ("launch",),
)
"""Lowest first. A module may import its own layer and those below it."""

PLACES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("dsso/engines/",),
    "accelerate": ("dsso/engines/",),
    "transformers.Trainer": ("dsso/engines/",),
    "transformers.trainer": ("dsso/engines/",),
    "torch.distributed.fsdp": ("dsso/engines/",),
    "matplotlib": ("dsso/plots.py", "dsso/plots_functions.py", "dsso/plots_sweep.py", "docs/"),
    "torchmetrics": ("dsso/tasks/metrics.py",),
    "peft": ("dsso/tasks/",),
    "triton": ("dsso/parallel/philox_triton.py",),
}
"""Where a heavy or fast-moving dependency may be imported."""

_RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Absolute names of imported modules with their lines; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            yield base, node.lineno
            # `from dsso import optim` imports the module dsso.optim
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def layer_of(module: str) -> int | None:
    """Rank of the layer that a dotted name belongs to, None when it is not ours."""
    parts = module.split(".")
    if parts[0] == "launch":
        return _RANK["launch"]
    if parts[0] != "dsso" or len(parts) == 1:
        return None
    return _rank(parts[1])


def _rank(name: str) -> int | None:
    # recipe_checks and the like are parts of recipe
    return _RANK.get(name, _RANK.get(name.partition("_")[0]))


def violations(source: str, path: str) -> list[str]:
    """Imports of one file that point upwards or sit in the wrong place."""
    parts = Path(path).with_suffix("").parts
    own = layer_of(".".join(parts))
    package = ".".join(parts if parts[-1] == "__init__" else parts[:-1])
    found = []
    for name, line in imports(ast.parse(source), package):
        rank = layer_of(name)
        if own is not None and rank is not None and rank > own:
            found.append(f"{path}:{line}: {name} is a layer above")
        for package_, places in PLACES.items():
            inside = f"{name}.".startswith(f"{package_}.")
            if inside and path.startswith("dsso/") and not path.startswith(places):
                found.append(f"{path}:{line}: {package_} belongs in {' or '.join(places)}")
    return sorted(set(found))


def test_imports_point_down() -> None:
    files = python_files("dsso", "launch")
    assert len(files) > 5
    found = [line for path in files for line in violations(path.read_text(), short(path))]
    assert not found, "\n".join(found)


def test_every_module_has_a_layer() -> None:
    names = {short(path).split("/")[1].removesuffix(".py") for path in python_files("dsso")}
    assert {name for name in names - {"__init__", "__main__"} if _rank(name) is None} == set()


def test_the_check_sees_violations() -> None:
    assert violations("from dsso.engines import build", "dsso/optim/kfac.py")
    assert violations("from ..engines import build", "dsso/optim/kfac.py")
    assert violations("from dsso import tasks", "dsso/engines/single.py")
    assert violations("def f():\n    import deepspeed.comm", "dsso/optim/kfac.py")
    assert violations("from torch.distributed.fsdp import fully_shard", "dsso/tasks/models.py")
    assert not violations("from dsso.linalg import kron\nimport torch", "dsso/optim/kfac.py")
    assert not violations("import deepspeed", "dsso/engines/deepspeed.py")


def test_the_layout_is_the_one_described() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for layer in LAYERS:
        for name in layer:
            if name != "_version":
                assert f"`{name}`" in text, f"docs/architecture.md does not name the module {name}"
