"""The conformance table: every method, every check, every engine.

    python tests/conformance/table.py              # all checks; engines at 1, 2 and 3 ranks with every model
    python tests/conformance/table.py --ranks 2    # fewer numbers of ranks
    python tests/conformance/table.py --only PSGD  # one method

For methods on gradients: first the checks of `test_methods.py`, by method; then the largest relative difference of a
parameter from a single process after five steps, by engine and number of ranks, of which none may exceed 1e-5. For
methods from forward passes: the checks of `test_forward_methods.py`; then the largest relative difference of a loss
from a single process in eight steps, of which none may exceed 1e-6, and of a parameter, of which none may exceed 1e-5.
The last line is one line of JSON; the exit status is 1 where anything is not green.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "dist")]

import cases  # noqa: E402
import invariance  # noqa: E402

from dsso.results import text_table  # noqa: E402
from tests import scenarios  # noqa: E402
from tests.conformance import forward_methods  # noqa: E402
from tests.conformance.methods import METHODS  # noqa: E402

LOSS_LIMIT = 1e-6
"""Largest relative difference of a loss of a method from forward passes."""
EVERY = (*METHODS, *forward_methods.METHODS)


class Outcomes:
    """Plugin of pytest: what became of every check, by its name and the method."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a test, and of a set-up that failed."""
        if report.when != "call" and report.outcome == "passed":
            return
        name, _, rest = report.nodeid.rpartition("::")[2].partition("[")
        method = next((m for m in EVERY if m in rest.rstrip("]").split("-")), None)
        if method is not None:
            check = name.removeprefix("test_").replace("_", " ")
            self.found.setdefault((check, method), []).append(report.outcome)


def checks(methods: Sequence[str], file: str = "test_methods.py") -> tuple[list[list[str]], bool]:
    """Rows of the checks, and whether all are green."""
    outcomes = Outcomes()
    argv = ["-q", "--no-header", "-p", "no:cacheprovider", str(HERE / file)]
    argv += ["-k", " or ".join(methods)]
    status = pytest.main(argv, plugins=[outcomes])
    names = list(dict.fromkeys(check for check, _ in outcomes.found))
    rows, green = [["check", *methods]], status == 0 and bool(names)
    for name in names:
        row = [name]
        for method in methods:
            found = outcomes.found.get((name, method), [])
            good = bool(found) and set(found) == {"passed"}
            green &= good
            row.append(f"ok ({len(found)})" if good else "FAILED" if found else "missing")
        rows.append(row)
    return rows, green


def engines(methods: Sequence[str], ranks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Largest difference, by method and then by engine and number of ranks."""
    out: dict[str, dict[str, float]] = {method: {} for method in methods}
    for world_size in ranks:
        chosen = [case for method in methods for case in cases.method_cases(method, world_size)]
        with tempfile.TemporaryDirectory() as folder:
            lines = invariance.run(chosen, world_size, Path(folder))
        for case, line in zip(chosen, lines, strict=True):
            key = f"{case.engine} W={world_size}"
            out[case.method][key] = max(out[case.method].get(key, 0.0), float(str(line["worst"])))
    return out


def forward_engines(methods: Sequence[str], ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Differences of methods from forward passes, a line a method, engine and number of ranks."""
    lines: list[dict[str, Any]] = []
    for world_size in ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.jsonl"
            lines += scenarios.run(HERE / "courses.py", out, world_size, 1200, methods)
    return lines


def on_gradients(methods: Sequence[str], ranks: Sequence[int]) -> tuple[dict[str, float], bool]:
    """Print both tables of methods on gradients; the largest difference of each, and whether all is green."""
    rows, green = checks(methods)
    print("\n" + text_table(rows) + "\n", flush=True)
    found = engines(methods, ranks)
    keys = list(dict.fromkeys(key for by_engine in found.values() for key in by_engine))
    if keys:
        body = [[key, *(f"{found[method][key]:.1e}" for method in methods)] for key in keys]
        print(text_table([["engine", *methods], *body]) + "\n", flush=True)
    worst = {method: max(by_engine.values(), default=0.0) for method, by_engine in found.items()}
    return worst, green and all(value <= invariance.LIMIT for value in worst.values())


def from_passes(methods: Sequence[str], ranks: Sequence[int]) -> tuple[dict[str, float], bool]:
    """Print both tables of methods from forward passes; likewise."""
    rows, green = checks(methods, "test_forward_methods.py")
    print("\n" + text_table(rows) + "\n", flush=True)
    lines = forward_engines(methods, ranks)
    places = list(dict.fromkeys((line["engine"], line["ranks"]) for line in lines))
    by = {(line["method"], line["engine"], line["ranks"]): line for line in lines}
    body = [
        [f"{engine} W={world}, {key}", *(f"{by[method, engine, world][key]:.1e}" for method in methods)]
        for engine, world in places
        for key in ("loss", "weights")
    ]
    if body:
        print(text_table([["engine", *methods], *body]) + "\n", flush=True)
    green &= all(line["loss"] <= LOSS_LIMIT and line["weights"] <= invariance.LIMIT for line in lines)
    worst = {
        method: max((x["weights"] for x in lines if x["method"] == method), default=0.0) for method in methods
    }
    return worst, green


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3], help="numbers of ranks")
    parser.add_argument("--only", nargs="*", default=list(EVERY), choices=EVERY, help="methods")
    arguments = parser.parse_args(argv)
    worst: dict[str, float] = {}
    green = True
    for tables, known in ((on_gradients, METHODS), (from_passes, forward_methods.METHODS)):
        chosen = [method for method in arguments.only if method in known]
        if chosen:
            differences, good = tables(chosen, arguments.ranks)
            worst |= differences
            green &= good
    print(json.dumps({"green": green, "worst": worst}))
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
