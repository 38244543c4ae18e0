"""What every method from forward passes must do, whatever it computes; a new file of `dsso/optim/` is found by itself.

That the course does not depend on engine, stage and number of ranks is checked in `tests/optim/forward_ranks.py`, the
equations of a method in `tests/optim`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsso.engines import make_forward_optimizer
from dsso.engines.forward import ForwardEngine
from dsso.errors import RecipeError
from dsso.optim import _spsa, resolve
from dsso.optim._probes import Piece, Probe
from dsso.recipe import load_recipe
from dsso.seedlog import Start
from tests.conformance import pages
from tests.conformance.forward_methods import CASES, METHODS, required
from tests.conformance.methods import batch, net
from tests.house.files import ROOT
from tests.optim.forward import CPU, bits, closure, kept, made
from tests.optim.forward_ranks import closure as share
from tests.plan.cases import forward, on_meta, planned, recipe

every_method = pytest.mark.parametrize("kind", METHODS)
every_variant = pytest.mark.parametrize(("kind", "given"), CASES.values(), ids=CASES.keys())
Given = dict[str, Any]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(value, two[name]) for name, value in one.items())


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_of_no_length_change_no_bit(kind: str, given: Given, dtype: torch.dtype) -> None:
    engine = made(dtype, kind, **given, weight_decay=0.1)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    before, state = bits(engine), copied(kept(engine))
    for step in range(50):
        engine.step(closure(engine, step % 3))
    assert same(bits(engine), before)
    assert all(not torch.equal(value, state[name]) for name, value in kept(engine).items())
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in kept(engine).values())
    assert engine.health()["skipped_steps"] == 0
    assert engine.health()["slope"] > 0


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_exactly(kind: str, given: Given, dtype: torch.dtype, tmp_path: Path) -> None:
    straight, resumed = (made(dtype, kind, **given, lr=1e-3, directions=2) for _ in range(2))
    first = bits(straight)
    for step in range(6):
        if step == 3:
            straight.save_checkpoint(tmp_path, "here", {"at": 3})
        straight.step(closure(straight, step))
    assert resumed.load_checkpoint(tmp_path, "here") == {"at": 3}
    for step in range(3, 6):
        resumed.step(closure(resumed, step))
    assert same(bits(resumed), bits(straight))
    assert same(kept(resumed), kept(straight))
    assert not same(bits(straight), first)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_makes_the_same_weights_and_state(kind: str, given: Given, dtype: torch.dtype) -> None:
    """From what JSON keeps of the parameters and of the steps, in an engine that was made with other parameters."""
    other = made(dtype, kind, **given)
    told = {**given, "lr": 1e-3, "directions": 2}
    straight = made(dtype, kind, **told)
    lines = []
    for step in range(5):
        straight.step(closure(straight, step))
        lines.append(json.dumps(straight.record))
    params = json.loads(json.dumps(resolve(kind).Config(**told).model_dump(mode="json")))
    start = Start(0, kind.lower(), params, {}, (), "", straight.dtype)
    other.replay((start, json.loads(line)) for line in lines)
    assert same(bits(other), bits(straight))
    assert same(kept(other), kept(straight))


@every_variant
def test_a_step_does_not_depend_on_how_the_weights_are_cut(
    kind: str, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, for pieces that are cut anywhere, and parts of them that begin anywhere."""
    monkeypatch.setattr(_spsa, "CHUNK", 256)
    module, numel = resolve(kind), 1500
    whole = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    found = []
    for cuts in ([0, numel], [0, 37, 801, numel]):
        out = [torch.empty(0), torch.empty(0)]
        for first, end in pairwise(cuts):
            method = module.Method(module.Config(**given, directions=2, lr=1e-3))
            piece = Piece("w", first, whole[first:end].clone(), True)
            method.attach([piece])
            shown = torch.empty(end - first, dtype=torch.bfloat16)
            for step in range(4):
                measures = torch.tensor([[0.7, 2.0], [-1.3, 5.0]], dtype=torch.float64)
                method.update([piece], measures, step, 1e-2)
            write = method.write(Probe(1, 1e-3), 4)
            assert write is not None
            write("w", first, piece.base, shown)
            out = [torch.cat([out[0], piece.base]), torch.cat([out[1], shown.float()])]
        found.append(out)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, whole)


class Largest(TorchDispatchMode):
    """Remembers the largest storage that an operation makes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.most, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@every_variant
def test_nothing_of_the_size_of_a_parameter_is_made(
    kind: str, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spsa, "CHUNK", 256)
    module = resolve(kind)
    method = module.Method(module.Config(**given, directions=2))
    piece, out = Piece("w", 0, torch.randn(4096), True), torch.empty(4096, dtype=torch.bfloat16)
    method.attach([piece])
    measures, write = torch.ones(2, 2, dtype=torch.float64), method.write(Probe(0, 1e-3), 0)
    assert write is not None
    known = [value for kinds in method.state.values() for value in kinds.values()]
    with Largest([piece.base, out, *known]) as seen:
        method.update([piece], measures, 0, 1e-3)
        write("w", 0, piece.base, out)
    assert seen.most <= 256


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slopes_of_zero_move_nothing(kind: str, given: Given, dtype: torch.dtype) -> None:
    engine = made(dtype, kind, **given, lr=1e-2)
    before = bits(engine)
    for step in range(6):
        plain = closure(engine, step)
        engine.step(lambda plain=plain: plain() * 0 + torch.tensor([3.0, 1.0]))
    assert engine.health()["skipped_steps"] == 0
    assert same(bits(engine), before)
    assert all(value.isfinite().all() for value in kept(engine).values())


@every_variant
def test_losses_that_no_state_could_take_in_are_skipped(kind: str, given: Given) -> None:
    engine = made(torch.float32, kind, **given, lr=1e-3)
    engine.step(closure(engine, 0))
    before, state = bits(engine), copied(kept(engine))
    for scale in (float("nan"), 1e30):
        plain = closure(engine, 1)
        engine.step(lambda plain=plain, scale=scale: plain() * torch.tensor([scale, 1.0]))
    assert engine.health()["skipped_steps"] == engine.health()["consecutive_skips"] == 2
    assert same(bits(engine), before)
    assert same(kept(engine), state)
    engine.step(closure(engine, 1))
    assert engine.health()["consecutive_skips"] == 0
    assert not same(bits(engine), before)
    assert all(p.isfinite().all() for p in engine.module.parameters())


@every_variant
def test_absurd_slopes_are_skipped_and_large_ones_cut(kind: str, given: Given) -> None:
    engine = made(torch.float32, kind, **given, lr=1e-3, skip_slope=1e4, max_slope=1.0)
    engine.step(closure(engine, 0))
    before = bits(engine)
    plain = closure(engine, 1)
    engine.step(lambda: plain() * torch.tensor([1e7, 1.0]))
    assert engine.health()["skipped_steps"] == 1
    assert same(bits(engine), before)
    engine.step(lambda: plain() * torch.tensor([10.0, 1.0]))
    assert engine.health()["skipped_steps"] == 1
    assert engine.health()["slope"] <= 1.0


@every_variant
def test_micro_batches_are_one_batch(kind: str, given: Given) -> None:
    """Sums and counts of losses travel: how a batch is cut has a say in their last digits only."""
    one, eight, untouched = (made(torch.float32, kind, **given, lr=1e-3) for _ in range(3))
    for step in range(4):
        whole, in_parts = share(one, step, 1, 0, together=8), share(eight, step, 1, 0, together=1)
        torch.testing.assert_close(one.step(whole), eight.step(in_parts), rtol=1e-6, atol=0)
    moved = 0.0
    for mine, theirs, first in zip(
        *(engine.module.parameters() for engine in (one, eight, untouched)), strict=True
    ):
        length = float((mine.detach() - first.detach()).norm())
        moved = max(moved, length)
        assert float((mine.detach() - theirs.detach()).norm()) <= 0.05 * length + 1e-6
    assert moved > 0


@every_variant
def test_frozen_unused_and_tied(kind: str, given: Given) -> None:
    """What is frozen or met by no pass stays, and is told; what is tied moves once."""
    model = net()
    config = resolve(kind).Config(**{**given, "lr": 1e-3})
    engine = ForwardEngine(model, make_forward_optimizer(model, kind, config), CPU, 1, 4)
    before = bits(engine)
    x, y = batch(1, torch.float32)

    def evaluate() -> Tensor:
        loss = nn.functional.cross_entropy(engine(x), y, reduction="sum")
        return torch.stack([loss, torch.tensor(float(len(y)))])

    with pytest.warns(UserWarning, match=r"2 trained parameter\(s\) stay as they are.*unused\.bias"):
        for _ in range(3):
            engine.step(evaluate)
    moved = {name for name, value in bits(engine).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith(("frozen", "unused"))}
    assert model.tied.weight is model.two.weight
    assert set(engine.left) == {"unused.weight", "unused.bias"}
    assert {row["parameter"] for row in engine.table()} == moved | set(engine.left)


@every_method
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_plan_counts_its_state(kind: str, world_size: int) -> None:
    raw = forward(kind, recipe("ddp", model="tiny-t5"), **required(kind))
    written, found = load_recipe(raw), planned(raw, world_size)
    model = on_meta(written).to_empty(device="cpu")
    model.tie_weights()  # which moving from one device to another has untied
    engine = ForwardEngine(model, make_forward_optimizer(model, kind, written.optimizer_config), CPU, 1, 4)
    held = sum(value.numel() * value.element_size() for value in kept(engine).values())
    assert [rank.moments for rank in found.ranks] == [held] * world_size


@every_method
def test_settings_that_are_refused(kind: str) -> None:
    module = resolve(kind)
    for given, told in (
        ({"lr": 0.0}, "greater than 0"),
        ({"eps": -1.0}, "eps"),
        ({"directions": 0}, "directions"),
    ):
        with pytest.raises(ValidationError, match=told):
            module.Config(**{**required(kind), **given})
    raw = forward(kind, recipe("ddp", model="tiny-t5"), **required(kind), direktions=2)
    with pytest.raises(
        RecipeError, match=r"(?s)optimizer.params.direktions: unknown key.*nearest: 'directions'"
    ):
        load_recipe(raw)


@every_method
def test_it_is_documented_and_has_recipes(kind: str) -> None:
    pages.check(kind)
    name = kind.lower()
    told = [file for file in (ROOT / "tests" / "optim").glob("test_*.py") if f'"{name}"' in file.read_text()]
    assert told or (ROOT / "tests" / "optim" / f"test_{name}.py").is_file(), "its equations"
