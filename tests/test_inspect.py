"""What the tool says of a checkpoint is what the factors are."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsso.checkpoint import Checkpointer
from dsso.curvature.quality import misfit
from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.inspect import inspect, main
from dsso.optim import resolve
from dsso.optim._figures import figures

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
BLOCKS = ("SHAMPOO", "SOAP", "PSGD")
MATRIX = re.compile(r"/(root|basis|factor)\d+$")
Capture = pytest.CaptureFixture[str]


def trained(kind: str = "KFAC", **settings: Any) -> SingleEngine:
    """A few steps on noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3))
    cpu = torch.device("cpu")
    intervals = ["refresh_interval"] if kind in BLOCKS else ["factor_interval", "inverse_interval"]
    config = resolve(kind).Config(**dict.fromkeys(intervals, 1), stagger=False, **settings)
    engine = SingleEngine(model, make_optimizer(model, kind, config, cpu), cpu, 1, 8)
    for _ in range(STEPS):
        x, y = torch.randn(8, 20), torch.randint(3, (8,))
        engine.backward(nn.functional.cross_entropy(engine(x), y), terms=8)
        engine.step()
    return engine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SingleEngine]:
    """A run's directory with one checkpoint, and the engine that wrote it."""
    folder = tmp_path_factory.mktemp("inspected")
    engine = trained(low_rank=5, low_rank_above=20, block_side=7)
    keeper = Checkpointer(folder / "checkpoints", 2)
    keeper.save(engine, STEPS, {}, {})
    return folder, engine


def test_figures_of_the_factors(run: tuple[Path, SingleEngine]) -> None:
    check_figures(*run)


def test_figures_of_eigenvectors(tmp_path: Path) -> None:
    engine = trained("EKFAC", block_side=7)
    Checkpointer(tmp_path / "checkpoints", 2).save(engine, STEPS, {}, {})
    check_figures(tmp_path, engine)
    assert {factor["kind"] for factor in inspect(tmp_path)["factors"]} == {"eigenvectors"}


def check_figures(folder: Path, engine: SingleEngine) -> None:
    """What is told of the factors is what they are."""
    found = inspect(folder)
    method: Any = engine.optimizer.method
    assert {factor["factor"] for factor in found["factors"]} == set(method.factors)
    for told in found["factors"]:
        factor = method.factors[told["factor"]]
        average = factor.matrix().double()
        values = torch.linalg.eigvalsh(average)
        damped = values + float(method.refresh._shifts[told["factor"]])
        assert told["sides"] == factor.dims.blocks
        assert told["mean"] == pytest.approx(float(values.mean()), rel=1e-5)
        assert told["condition"] == pytest.approx(float(damped.max() / damped.min()), rel=1e-3)
        assert told["rank"] == int((values > 1e-6 * values.max()).sum())
        assert (told["age"], told["owner"], told["ready"], told["failed"]) == (0, 0, True, False)
        # of (C + shift)^-1 to C^2, by eigenvalues
        wanted = math.sqrt(float((values.square() / damped).sum() * damped.sum())) / float(values.sum())
        suits = None if told["kind"] == "eigenvectors" else pytest.approx(wanted, rel=1e-3)
        assert told["misfit"] == suits
    # 21 rows in three blocks
    wide = next(factor for factor in found["factors"] if factor["factor"] == "0/a")
    assert wide["sides"] == (7, 7, 7)


@pytest.mark.parametrize("kind", BLOCKS)
def test_figures_of_blocks(tmp_path: Path, kind: str, capsys: Capture) -> None:
    engine = trained(kind, block_side=9)
    engine.save_checkpoint(tmp_path, "mine", {})
    found = {one["factor"]: one for one in inspect(tmp_path / "mine")["factors"]}
    kept = {name: tensor.double() for name, tensor in engine.optimizer.method.state_tensors().items()}  # type: ignore[union-attr]
    # 12 x 20 in two times three blocks, 3 x 12 in two; both sides of each, but for PSGD's long and narrow
    expected = {re.sub(r"(root|basis|factor)(?=\d+$)", "", name) for name in kept if MATRIX.search(name)}
    assert set(found) == expected
    assert len(found) == 16
    for key, told in found.items():
        block, _, dim = key.rpartition("/")
        if kind == "PSGD":
            average = acting = kept[f"{block}/factor{dim}"].mT @ kept[f"{block}/factor{dim}"]
        else:
            acting = kept[f"{block}/{'root' if kind == 'SHAMPOO' else 'basis'}{dim}"]
            # A packed triangle, row by row.
            average, (rows, columns) = torch.zeros_like(acting), torch.tril_indices(*acting.shape)
            average[rows, columns] = average[columns, rows] = kept[f"{block}/sum{dim}"]
            acting = acting if kind == "SHAMPOO" else average
        values = torch.linalg.svdvals(average)
        assert told["sides"] == (len(average),)
        assert told["mean"] == pytest.approx(float(values.mean()), rel=1e-6)
        assert told["rank"] == int((values > 1e-6 * values.max()).sum())
        if told["condition"] is not None:
            assert told["condition"] == pytest.approx(float(torch.linalg.cond(acting)), rel=1e-3)
        assert (told["owner"], told["age"], told["ready"], told["failed"]) == (0, 0, True, False)
        suits = misfit([acting], [average]) if kind == "SHAMPOO" else None
        assert told["misfit"] == (None if suits is None else pytest.approx(suits, rel=1e-9))
        own = [tensor for name, tensor in kept.items() if name.startswith(f"{block}/") and name.endswith(dim)]
        assert told["bytes"] == sum(tensor.numel() * 4 for tensor in own)
    # whatever is inverted has a condition number; a second moment of four gradients need not have one
    assert kind == "SOAP" or all(told["condition"] is not None for told in found.values())
    assert any(told["condition"] is not None for told in found.values())
    assert main([str(tmp_path / "mine")]) == 0
    assert "0.weight/0/1" in capsys.readouterr().out


def test_the_curvature_of_another_run(tmp_path: Path, capsys: Capture) -> None:
    """PSGD keeps none; K-FAC's suits another batch's worse than its own."""
    for kind, settings in {"PSGD": {"sides": "all"}, "SOAP": {}, "KFAC": {}}.items():
        engine = trained(kind, **settings)
        engine.save_checkpoint(tmp_path, kind, {})
        if kind == "PSGD":
            kept = {n: t.double() for n, t in engine.optimizer.method.state_tensors().items()}  # type: ignore[union-attr]
        elif kind == "SOAP":
            sums = {n: t.double() for n, t in engine.optimizer.method.state_tensors().items()}  # type: ignore[union-attr]
    assert {one["misfit"] for one in inspect(tmp_path / "PSGD")["factors"]} == {None}
    told = inspect(tmp_path / "PSGD", against=tmp_path / "SOAP")["factors"]
    assert len(told) == 4
    for one in told:
        block, _, dim = one["factor"].rpartition("/")
        q_DD = kept[f"{block}/factor{dim}"]
        s_DD, (rows, columns) = torch.zeros_like(q_DD), torch.tril_indices(*q_DD.shape)
        s_DD[rows, columns] = s_DD[columns, rows] = sums[f"{block}/sum{dim}"]
        assert one["misfit"] == pytest.approx(misfit([q_DD.mT @ q_DD], [s_DD]), rel=1e-9)
    own = {one["factor"]: one["misfit"] for one in inspect(tmp_path / "KFAC")["factors"]}
    low = trained(low_rank=3, low_rank_above=10)
    low.save_checkpoint(tmp_path, "LOW", {})
    # forms may differ, and the average of a form that leaves something out is another one
    other = {one["factor"]: one for one in inspect(tmp_path / "KFAC", against=tmp_path / "LOW")["factors"]}
    assert other["0/a"]["misfit"] > own["0/a"] >= 1
    assert other["2/g"]["misfit"] == pytest.approx(own["2/g"], rel=1e-3)
    assert main([str(tmp_path / "PSGD"), "--against", str(tmp_path / "SOAP")]) == 0
    assert "misfit" in capsys.readouterr().out
    for wrong, words in {
        "KFAC": "it has no curvature of the same factors or blocks",
        "nowhere": "--against: no checkpoint is there",
    }.items():
        assert main([str(tmp_path / "PSGD"), "--against", str(tmp_path / wrong)]) == 2
        assert words in capsys.readouterr().err


def test_blocks_without_a_preconditioner(tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    cpu = torch.device("cpu")
    engine = SingleEngine(
        model, make_optimizer(model, "SHAMPOO", resolve("SHAMPOO").Config(), cpu), cpu, 1, 8
    )
    engine.save_checkpoint(tmp_path, "mine", {})
    assert main([str(tmp_path / "mine")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weight/0/")]
    assert len(rows) == 2
    assert all(row.endswith("no factorization yet") for row in rows)


def test_low_rank_forms_and_what_is_under_way(tmp_path: Path) -> None:
    engine = trained(low_rank=5, low_rank_above=15, async_delay=2)
    engine.save_checkpoint(tmp_path, "mine", {})
    found = {factor["factor"]: factor for factor in inspect(tmp_path / "mine")["factors"]}
    wide, method = found["0/a"], engine.optimizer.method
    assert (wide["kind"], wide["kept"], wide["sides"]) == ("low rank", 5, (21,))
    assert wide["pending"] == 2
    assert found["2/g"]["kind"] == "dense"
    block = method.factors["0/a"].blocks[0]  # type: ignore[union-attr]
    inverse_DD = block.applied @ block.inverse_KK @ block.applied.mT + block.tail * torch.eye(21)
    values = torch.linalg.eigvalsh(inverse_DD.double())
    assert wide["condition"] == pytest.approx(float(values.max() / values.min()), rel=1e-3)


def test_how_many_leading_pairs_are_in_use(tmp_path: Path, capsys: Capture) -> None:
    engine = trained(low_rank=8, low_rank_above=15, low_rank_energy=0.25)
    engine.save_checkpoint(tmp_path, "mine", {})
    wide = next(one for one in inspect(tmp_path / "mine")["factors"] if one["factor"] == "0/a")
    block = engine.optimizer.method.factors["0/a"].blocks[0]  # type: ignore[union-attr]
    held = block.core_KK.diagonal().cumsum(0) / block.total
    assert 0 < wide["used"] < wide["kept"] == 8
    assert wide["used"] == int((held < 0.25).sum()) + 1
    assert main([str(tmp_path / "mine")]) == 0
    assert f"low rank 8, {wide['used']} in use" in capsys.readouterr().out


def test_the_description(run: tuple[Path, SingleEngine], capsys: Capture) -> None:
    folder, engine = run
    assert main([str(folder / "checkpoints" / "step_00000004"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["world_size"], found["engine"], found["stage"]) == (4, 1, "single", None)
    assert (found["method"], found["dtype"], found["lr"]) == ("kfac", "float32", 0.05)
    assert found["elements"] == sum(p.numel() for p in engine.module.parameters())
    assert found["bytes"]["total"] == sum(
        file.stat().st_size
        for file in (folder / "checkpoints" / "step_00000004").rglob("*")
        if file.is_file()
    )
    assert found["bytes"]["partition"] > 2 * 4 * found["elements"]  # weights and momenta
    assert main([str(folder), "--quick"]) == 0
    text = capsys.readouterr().out
    assert "written by 1 rank(s), single; optimizer kfac" in text
    assert "0/a     dense  3x7" in text


def test_what_cannot_be_used(run: tuple[Path, SingleEngine], tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    one = folder / "checkpoints" / "step_00000004"
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "PATH: no checkpoint is there" in capsys.readouterr().err
    file = one / "dsso" / "method_rank00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main([str(folder)]) == 1
    assert "content of dsso/method_rank00000.safetensors is not what was written" in capsys.readouterr().err
    file.write_bytes(whole[:50])
    for path in (folder, one):
        assert main([str(path)]) == 1
        assert "has 50 bytes instead of" in capsys.readouterr().err
    # the newest good one is shown, and the other is named
    shutil.copytree(run[0] / "checkpoints" / "step_00000004", folder / "checkpoints" / "step_00000003")
    assert main([str(folder)]) == 0
    assert "passed over: step_00000004" in capsys.readouterr().out


def test_progress_is_shown_on_a_terminal(run: tuple[Path, SingleEngine]) -> None:
    inside, outside = pty.openpty()
    termios.tcsetwinsize(outside, (24, 80))
    os.set_blocking(inside, False)
    words = [sys.executable, "-m", "dsso.inspect", str(run[0])]
    done = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=outside, text=True, check=True, timeout=120
    )
    told = os.read(inside, 4096).decode()
    os.close(outside)
    os.close(inside)
    assert "rank 1 of 1" in told and "factor" in told
    assert "rank 1 of 1" not in done.stdout


def test_condition_numbers_are_those_of_the_singular_values() -> None:
    """Up to the worst that a factorization in float32 can hold."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    for worst in (10.0, 1e4, 1e7):
        spectrum = torch.logspace(0, -math.log10(worst), 40, dtype=torch.float64)
        lower = torch.linalg.cholesky(basis * spectrum @ basis.mT).float()
        tensors = {"f/ready": torch.tensor(True), "f/weight": torch.tensor(1.0)}
        tensors |= {"f/0/square": lower, "f/0/diagonal": torch.ones(40)}
        exact = torch.linalg.svdvals(lower.double()).square()
        found = figures("f", tensors, 40).condition
        assert found == pytest.approx(float(exact.max() / exact.min()), rel=1e-6)
        del tensors["f/0/square"]
        tensors["f/0/square_inverse"] = torch.cholesky_inverse(lower.double()).tril()
        found = figures("f", tensors, 40).condition
        assert found == pytest.approx(float(exact.max() / exact.min()), rel=1e-6)


def test_the_command(run: tuple[Path, SingleEngine]) -> None:
    words = [sys.executable, "-m", "dsso.inspect", str(run[0]), "--quick"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert "step 4 (0 skipped)" in done.stdout
    assert not done.stderr
