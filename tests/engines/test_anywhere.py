"""A checkpoint goes on at any number of ranks, on any ZeRO stage and engine, as the uninterrupted run would."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsso.errors import RunError
from tests.engines import anywhere
from tests.engines.anywhere import Leg

ROOT = Path(__file__).resolve().parents[2]
LAST = 8

# Written by one rank without DeepSpeed; then, at two ranks, written and read at every stage.
BEFORE = [
    Leg("single", "single"),
    Leg("single-bf16", "single", "bf16"),
    Leg("straight", "single", last=LAST),
    Leg("straight-bf16", "single", "bf16", last=LAST),
    Leg("straight-rich", "single", last=LAST, settings="rich"),
]
WRITTEN = [Leg(f"zero{stage}", str(stage)) for stage in range(4)] + [
    Leg("zero2-bf16", "2", "bf16"),
    Leg("zero1-rich", "1", settings="rich"),
]
WRITTEN += [
    Leg("fsdp2", "fsdp2"),
    Leg("ddp", "ddp"),
    Leg("fsdp2-bf16", "fsdp2", "bf16"),
    Leg("fsdp2-rich", "fsdp2", settings="rich"),
]
MOVED = [
    Leg("zero2-to-3", "3", load="zero2", first=3, last=LAST),
    Leg("zero3-to-1", "1", load="zero3", first=3, last=LAST),
    Leg("zero1-to-0", "0", load="zero1", first=3, last=LAST),
    Leg("zero0-to-2", "2", load="zero0", first=3, last=LAST),
    Leg("single-to-zero2", "2", load="single", first=3, last=LAST),
    Leg("single-to-zero3", "3", load="single", first=3, last=LAST),
    Leg("zero3-to-fsdp2", "fsdp2", load="zero3", first=3, last=LAST),
    Leg("fsdp2-to-zero2", "2", load="fsdp2", first=3, last=LAST),
    Leg("fsdp2-to-ddp", "ddp", load="fsdp2", first=3, last=LAST),
    Leg("ddp-to-fsdp2", "fsdp2", load="ddp", first=3, last=LAST),
    Leg("single-to-fsdp2", "fsdp2", load="single", first=3, last=LAST),
    Leg("zero2-bf16-to-fsdp2", "fsdp2", "bf16", load="zero2-bf16", first=3, last=LAST),
    Leg("fsdp2-bf16-to-zero1", "1", "bf16", load="fsdp2-bf16", first=3, last=LAST),
    Leg("zero2-bf16-to-3", "3", "bf16", load="zero2-bf16", first=3, last=LAST),
    Leg("zero2-bf16-to-0", "0", "bf16", load="zero2-bf16", first=3, last=LAST),
    Leg("single-bf16-to-zero1", "1", "bf16", load="single-bf16", first=3, last=LAST),
    Leg("zero1-rich-to-3", "3", load="zero1-rich", first=3, last=LAST, settings="rich"),
]
AFTER = [
    Leg("zero2-to-single", "single", load="zero2", first=3, last=5),
    Leg("fsdp2-to-single", "single", load="fsdp2", first=3, last=LAST),
    Leg("zero3-to-single", "single", load="zero3", first=3, last=LAST),
    Leg("zero2-bf16-to-single", "single", "bf16", load="zero2-bf16", first=3, last=LAST),
    Leg("fsdp2-rich-to-single", "single", load="fsdp2-rich", first=3, last=LAST, settings="rich"),
    Leg("zero1-rich-to-single", "single", load="zero1-rich", first=3, last=LAST, settings="rich"),
    # the masters are fp32 in any case
    Leg("zero2-bf16-to-fp32", "single", "fp32", load="zero2-bf16", first=3, last=LAST),
]
for turn, method in enumerate(anywhere.OTHERS):
    # Every method is written by one engine, goes on under another one, and alone; the engines in turn.
    names = ("1", "fsdp2", "3", "ddp", "2", "0")
    there, next_ = names[turn % 6], names[(turn + 1) % 6]
    BEFORE.append(Leg(f"straight-{method}", "single", last=LAST, settings=method))
    WRITTEN.append(Leg(f"{method}-written", there, settings=method))
    MOVED.append(Leg(f"{method}-moved", next_, load=f"{method}-written", first=3, last=LAST, settings=method))
    AFTER.append(
        Leg(f"{method}-alone", "single", load=f"{method}-written", first=3, last=LAST, settings=method)
    )
CHAIN = [
    Leg("two-one-four-zero3", "3", load="zero2-to-single", first=5, last=LAST),
    Leg("two-one-four-zero1", "1", load="zero2-to-single", first=5, last=LAST),
    Leg("two-one-four-fsdp2", "fsdp2", load="zero2-to-single", first=5, last=LAST),
    Leg("two-one-four-ddp", "ddp", load="zero2-to-single", first=5, last=LAST),
]


def group(ranks: int, legs: list[Leg], folder: Path) -> None:
    """Run legs at a number of ranks."""
    plan = anywhere.write(legs, folder / f"legs{ranks}.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / "tests" / "engines" / "anywhere.py"), str(folder), str(plan)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All legs at one and at two ranks."""
    where = tmp_path_factory.mktemp("anywhere")
    for leg in BEFORE:
        anywhere.run(leg, where, 1)
    group(2, WRITTEN + MOVED, where)
    for leg in AFTER:
        anywhere.run(leg, where, 1)
    return where


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / f"{name}.pt", weights_only=True)
    return found


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of an element, over the largest element of its parameter; infinite where one is not finite."""
    assert one.keys() == other.keys()
    each = [
        float((one[n].float() - other[n].float()).abs().max() / other[n].float().abs().max()) for n in one
    ]
    return max(value if math.isfinite(value) else math.inf for value in each)


@pytest.mark.dist
@pytest.mark.timeout(700)
@pytest.mark.parametrize("leg", MOVED + AFTER, ids=lambda leg: leg.name)
def test_what_is_read_is_what_was_written(leg: Leg, folder: Path) -> None:
    assert leg.load is not None
    found, wanted = weights(folder, f"{leg.name}.loaded"), weights(folder, leg.load)
    for name, value in wanted.items():
        if found[name].dtype == value.dtype:
            assert torch.equal(found[name], value), name
        else:  # an fp32 model gets the masters, of which the bf16 model had the rounded ones
            assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.dist
@pytest.mark.timeout(700)
@pytest.mark.parametrize("leg", [leg for leg in MOVED + AFTER if leg.last == LAST], ids=lambda leg: leg.name)
def test_it_goes_on_as_the_uninterrupted_run(leg: Leg, folder: Path) -> None:
    settings = "" if leg.settings == "plain" else f"-{leg.settings}"
    found, straight = weights(folder, leg.name), weights(folder, f"straight{settings}")
    if "bf16" not in leg.name:
        assert difference(found, straight) <= 1e-5
    else:
        # at most twice what bf16 itself does to the uninterrupted run
        rounding = difference(weights(folder, "straight-bf16"), straight)
        assert 1e-4 < rounding < 1e-1
        reference = straight if leg.dtype == "fp32" else weights(folder, "straight-bf16")
        assert difference(found, reference) <= 2 * rounding
    # the course matters: without the steps in between the weights are elsewhere
    assert leg.load is not None
    before = weights(folder, leg.load)
    assert (
        not difference(*({n: w[n] for n in w if n not in ("counts", "mean")} for w in (before, straight)))
        <= 1e-2
    )


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(700)
def test_two_then_one_then_four_ranks(folder: Path) -> None:
    group(4, CHAIN, folder)
    for leg in CHAIN:
        assert weights(folder, leg.name)["counts"].tolist() == [LAST, LAST]
        assert difference(weights(folder, leg.name), weights(folder, "straight")) <= 1e-5


@pytest.mark.dist
@pytest.mark.timeout(700)
def test_factors_are_found_by_name_not_by_rank(folder: Path) -> None:
    two = anywhere.build(Leg("one", "single"), 1)
    two.load_checkpoint(folder, "zero3")
    one = anywhere.build(Leg("one", "single"), 1)
    one.load_checkpoint(folder, "single")
    mine, theirs = two.optimizer.method.state_tensors(), one.optimizer.method.state_tensors()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = float(value.float().abs().max())
        assert float((mine[name].float() - value.float()).abs().max()) <= 1e-4 * scale, name


def _refused(folder: Path, engine: Any, tag: str = "single") -> str:
    with pytest.raises(RunError) as caught:
        engine.load_checkpoint(folder, tag)
    return str(caught.value)


def test_another_model_is_refused_by_the_name_of_a_parameter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wider(anywhere.Net):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(17, 6, bias=False)

    class Further(anywhere.Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Linear(17, 6)

    leg = Leg("other", "single")
    monkeypatch.setattr(anywhere, "Net", Wider)
    told = _refused(folder, anywhere.build(leg, 1))
    assert "parameter last.weight has another shape" in told
    assert "got: (6, 17)" in told and "allowed: (5, 17)" in told
    monkeypatch.setattr(anywhere, "Net", Further)
    assert "the checkpoint has no parameter more.weight" in _refused(folder, anywhere.build(leg, 1))


def test_moments_that_are_missing_are_refused(folder: Path, tmp_path: Path) -> None:
    leg = Leg("plain", "single")
    engine = anywhere.build(leg, 1, momentum=0.0)
    anywhere.step(engine, 0, "fp32")
    engine.save_checkpoint(tmp_path, "plain", {})
    told = _refused(tmp_path, anywhere.build(leg, 1), "plain")
    assert "the checkpoint has no exp_avg of parameter first.weight" in told
    # the other way there is nothing to miss
    anywhere.build(leg, 1, momentum=0.0).load_checkpoint(folder, "single")


def test_a_window_that_is_not_complete_is_not_written(tmp_path: Path) -> None:
    engine = anywhere.build(Leg("half", "single"), 1)
    loss = engine(torch.randn(8, 8)).square().mean()
    engine.backward(loss, terms=8)
    with pytest.raises(RunError, match="1 micro-batch"):
        engine.save_checkpoint(tmp_path, "half", {})


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {1: "a"}, {"a": torch.zeros(1)}, {"a": float("nan")}])
def test_a_client_state_that_would_change_is_refused(state: dict[Any, Any], tmp_path: Path) -> None:
    engine = anywhere.build(Leg("state", "single"), 1)
    with pytest.raises(RunError, match="client_state"):
        engine.save_checkpoint(tmp_path, "state", state)


def test_a_missing_piece_is_named(folder: Path, tmp_path: Path) -> None:
    engine = anywhere.build(Leg("gap", "single"), 1)
    engine.save_checkpoint(tmp_path, "gap", {})
    file = tmp_path / "gap" / "dsso" / "partition_rank00000.safetensors"
    file.write_bytes((folder / "zero2" / "dsso" / "partition_rank00001.safetensors").read_bytes())
    told = _refused(tmp_path, engine, "gap")
    assert "lacks element 0 of the weight of a parameter" in told
    description = tmp_path / "gap" / "dsso" / "engine.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 7}))
    assert "format of the checkpoint is not known" in _refused(tmp_path, engine, "gap")
