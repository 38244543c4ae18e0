"""Products with curvature, every engine by every way: exact against dense matrices, or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engines import products

ROOT = Path(__file__).resolve().parents[2]
CLOSE = {"double_backward": 2e-6, "difference": 5e-4}
"""Relative error in fp32."""


def check(found: dict[str, Tensor], kind: str, how: str) -> None:
    wanted = torch.cat(list(products.dense(kind).values()))
    whole = torch.cat([found[name] for name in products.vector()]).double()
    assert (whole - wanted).norm() <= CLOSE[how] * wanted.norm()
    # What no loss reaches has no curvature.
    assert not found["unused.weight"].any()


@pytest.mark.parametrize(("kind", "how"), products.PRODUCTS)
def test_one_process(kind: str, how: str) -> None:
    check(products.found("single", kind, how, 1), kind, how)  # type: ignore[arg-type]


def test_dropout_is_the_same_in_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences and double backward passes agree under dropout only if every pass leaves out the same."""
    own = products.net

    def dropping() -> products.Net:
        model = own()
        model.drop.p = 0.5
        return model

    monkeypatch.setattr(products, "net", dropping)
    found = []
    for how in ("difference", "double_backward"):
        torch.manual_seed(3)
        one = products.found("single", "ggn", how, 1)
        found.append(torch.cat(list(one.values())))
    assert (found[0] - found[1]).norm() <= 1e-3 * found[1].norm()
    assert (found[1] - torch.cat(list(products.dense("ggn").values()))).norm() > 0.1 * found[1].norm()


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_two_ranks(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "torchrun"
    command = [program, "--standalone", "--nproc_per_node", "2", products.__file__, tmp_path]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(part) for part in command], env=environ, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for engine in products.ENGINES[1:]:
        for kind, how in products.PRODUCTS:
            name = f"{engine} {kind} {how}"
            if engine in products.SHARDED and how == "double_backward":
                for rank in range(2):
                    words = (tmp_path / f"{name}.{rank}.txt").read_text()
                    assert "has no whole weights to differentiate twice" in words
                    assert "set it to 'difference'" in words
                continue
            check(torch.load(tmp_path / f"{name}.pt"), kind, how)
