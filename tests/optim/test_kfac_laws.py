"""What a K-FAC step must keep to: clipping, skipping, retries, no host synchronization, stated leftovers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.errors import RecipeError, RunError
from dsso.optim.kfac import BaseConfig, Config

CPU = torch.device("cpu")


class Net(nn.Module):
    """A linear stack with a norm and an embedding between, so that the base method has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first, self.norm, self.second = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(self.embed(ids)))))


def _net() -> Net:
    torch.manual_seed(0)
    return Net()


def _engine(model: nn.Module, gas: int = 1, **settings: Any) -> SingleEngine:
    config = Config(**settings)
    engine = SingleEngine(model, make_optimizer(model, "KFAC", config, CPU), CPU, gas, 8)
    engine.train()
    return engine


def _batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(11, (8,), generator=generator), torch.randint(3, (8,), generator=generator)


def _step(engine: SingleEngine, seed: int = 0, poison: float | None = None) -> None:
    x, y = _batch(seed)
    loss = nn.functional.cross_entropy(engine(x), y)
    if poison is not None:
        loss = loss * poison
    engine.backward(loss, terms=8)
    engine.step()


def _snapshot(engine: SingleEngine) -> dict[str, Tensor]:
    out = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    for i, state in enumerate(engine.optimizer.state.values()):
        out |= {f"state{i}/{k}": v.clone() for k, v in state.items()}
    out |= {k: v.clone() for k, v in engine.optimizer.method.state_tensors().items()}
    return out


def test_table_lists_every_parameter_with_its_method_and_reason() -> None:
    rows = {row["parameter"]: row for row in _engine(_net()).table()}
    assert set(rows) == {n for n, _ in Net().named_parameters()}
    assert rows["first.weight"]["method"] == rows["first.bias"]["method"] == "KFAC"
    assert rows["first.weight"]["owner"] == 0
    assert rows["norm.weight"]["method"] == "adamw"
    assert "LayerNorm" in rows["norm.weight"]["reason"]
    assert "Embedding" in rows["embed.weight"]["reason"]


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1e9])
def test_post_clip_bounds_the_newton_step_of_all_parameters(tau: float) -> None:
    """With plain SGD everywhere the step is lr times the clipped u, fallback parameters included."""
    lr = 0.1
    model = _net()
    engine = _engine(
        model, lr=lr, momentum=0.0, clip="post", tau=tau, base=BaseConfig(type="SGD", momentum=0.0)
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _step(engine)
    moved = torch.cat([(p.detach() - before[n]).reshape(-1) for n, p in model.named_parameters()]).norm() / lr
    health = engine.health()
    wanted = min(tau, health["update_norm"])
    assert moved.item() == pytest.approx(wanted, rel=1e-3)
    assert health["clip_scale"] == pytest.approx(min(1.0, tau / health["update_norm"]), rel=1e-5)
    assert health["clip_events"] == float(tau < health["update_norm"])


def test_pre_clip_is_a_clip_of_the_gradient() -> None:
    """Clipping g before preconditioning equals scaling u by min(1, tau/|g|)."""
    results = []
    for clip, tau in (("none", 1.0), ("pre", 0.05)):
        model = _net()
        engine = _engine(
            model, lr=0.1, momentum=0.0, clip=clip, tau=tau, base=BaseConfig(type="SGD", momentum=0.0)
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        _step(engine)
        results.append({n: p.detach() - before[n] for n, p in model.named_parameters()})
        health = engine.health()
    assert health["grad_norm"] > 0.05
    for name, free in results[0].items():
        torch.testing.assert_close(
            results[1][name], free * (0.05 / health["grad_norm"]), rtol=2e-3, atol=1e-7
        )


def test_kl_clip_bounds_the_change_of_predictions() -> None:
    kappa, lr = 1e-6, 0.1
    engine = _engine(_net(), lr=lr, momentum=0.0, clip="none", kl_clip=kappa)
    _step(engine)
    health = engine.health()
    ug = health["cos_update_grad"] * health["update_norm"] * health["grad_norm"]
    assert lr**2 * health["clip_scale"] ** 2 * ug == pytest.approx(kappa, rel=1e-3)


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_batch_changes_nothing_and_is_counted(base: str, poison: float) -> None:
    engine = _engine(_net(), weight_decay=0.1, base=BaseConfig(type=base))
    for seed in range(3):
        _step(engine, seed)
    before = _snapshot(engine)
    _step(engine, 3, poison)
    after = _snapshot(engine)
    for name, value in before.items():
        assert torch.equal(value, after[name]) or name.endswith("/square"), name
    assert engine.health()["skipped_steps"] == 1
    assert engine.health()["consecutive_skips"] == 1
    _step(engine, 4)
    health = engine.health()
    assert health["skipped_steps"] == 1
    assert health["consecutive_skips"] == 0
    assert all(torch.isfinite(t).all() for t in _snapshot(engine).values())


def test_a_lost_refresh_is_repeated() -> None:
    """Statistics are due on step 0 only; step 0 is lost, and the layers must not wait for ever."""
    engine = _engine(_net(), factor_interval=[[0, 1], [1, None]], inverse_interval=[[0, 1], [1, None]])
    _step(engine, 0, float("nan"))
    for seed in range(1, 5):
        _step(engine, seed)
    health = engine.health()
    assert health["layers_without_factors"] == 0
    assert health["cos_update_grad"] < 0.999


def test_lora_like_zero_start_gets_its_factors_without_waiting_for_the_interval() -> None:
    """B = 0 makes the first refresh of A useless: it must be repeated as soon as there is a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False))
    nn.init.zeros_(model[1].weight)
    engine = _engine(
        model, lr=0.5, clip="none", damping_floor=0.0, factor_interval=1000, inverse_interval=1000
    )
    x, y = torch.randn(8, 5), torch.randint(4, (8,))
    first = model[0].weight.detach().clone()
    for _ in range(6):
        engine.backward(nn.functional.cross_entropy(engine(x), y), terms=8)
        engine.step()
    assert engine.health()["layers_without_factors"] == 0
    assert not torch.equal(first, model[0].weight)


@pytest.mark.parametrize(("apply", "square"), [("solve", "square"), ("inverse", "square_inverse")])
def test_a_failed_factorization_keeps_the_last_good_one_and_is_retried(
    apply: Any, square: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsso.optim import _factor

    def chol() -> Tensor:
        return engine.optimizer.method.state_tensors()[f"first/a/0/{square}"].tril().clone()

    engine = _engine(_net(), factor_interval=1, inverse_interval=1, stagger=False, apply=apply)
    _step(engine, 0)
    good = chol()
    real, calls = _factor.kron.cholesky, []

    def failing(x: Tensor, jitter: float = 0.0) -> tuple[Tensor, Tensor]:
        calls.append((x.dtype, jitter))
        factor, failed = real(x, jitter)
        return factor, torch.ones_like(failed) if x.dtype == torch.float32 else failed

    monkeypatch.setattr(_factor.kron, "cholesky", failing)
    _step(engine, 1)
    assert torch.equal(chol(), good)
    assert engine.health()["layers_without_factors"] == 0  # the good ones are in use
    calls.clear()
    engine.optimizer.method.config = engine.optimizer.method.config.model_copy(
        update={"inverse_interval": type(engine.optimizer.method.config.inverse_interval).every(1000)}
    )
    _step(engine, 2)
    assert {dtype for dtype, _ in calls} == {torch.float64}
    assert all(jitter > 0 for _, jitter in calls)
    assert not torch.equal(chol(), good)
    assert engine.health()["factor_failures"] == 4  # both factors of both layers, once
    assert torch.isfinite(chol()).all()


def test_zero_gradient_is_a_zero_step() -> None:
    model = _net()
    engine = _engine(model, momentum=0.0, base=BaseConfig(type="SGD"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _step(engine, 0, 0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter), name
    health = engine.health()
    assert health["update_norm"] == 0
    assert health["skipped_steps"] == 0


def test_no_host_synchronization_between_logging_steps(forbid_host_sync: Callable[[], None]) -> None:
    """Neither values nor truth of tensors are asked for in a step, refreshes and clipping included."""
    engine = _engine(_net(), gas=2, factor_interval=2, inverse_interval=4)
    for seed in range(4):
        _step(engine, seed)
    forbid_host_sync()
    for seed in range(16):
        _step(engine, seed)
    with pytest.raises(AssertionError, match="host synchronization"):
        engine.health()


def test_unused_and_frozen_layers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(torch.tanh(self.used(x)))

    torch.manual_seed(0)
    model = Branches()
    engine = _engine(model)
    frozen, unused = model.frozen.weight.clone(), model.unused.weight.clone()
    for _ in range(3):
        engine.backward(
            nn.functional.cross_entropy(engine(torch.randn(8, 4)), torch.randint(3, (8,))), terms=8
        )
        engine.step()
    assert torch.equal(model.frozen.weight, frozen)
    assert torch.equal(model.unused.weight, unused)
    assert "frozen.weight" not in {row["parameter"] for row in engine.table()}
    assert engine.health()["consecutive_skips"] == 0


def test_tied_weights_and_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(7, 5), Conv1D(5, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.mix(self.embed(ids))))

    torch.manual_seed(0)
    tied = Tied()
    engine = _engine(tied)
    rows = {row["parameter"]: row for row in engine.table()}
    assert rows["embed.weight"]["reason"] == "weight tied between modules"
    assert rows["mix.weight"]["method"] == "KFAC"
    # Conv1D stores [inputs, outputs]: its step equals that of the Linear with the transposed weight.
    twin = Tied()
    twin.load_state_dict(tied.state_dict())
    linear = nn.Linear(5, 5)
    with torch.no_grad():
        linear.weight.copy_(tied.mix.weight.mT)
        linear.bias.copy_(tied.mix.bias)
    twin.mix = linear
    other = _engine(twin)
    ids, y = torch.randint(7, (8,)), torch.randint(7, (8,))
    for e in (engine, other):
        e.backward(nn.functional.cross_entropy(e(ids), y), terms=8)
        e.step()
    torch.testing.assert_close(tied.mix.weight.mT, twin.mix.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tied.mix.bias, twin.mix.bias, rtol=1e-5, atol=1e-7)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="no layer for K-FAC") as caught:
        make_optimizer(nn.Embedding(3, 4), "KFAC", Config(), CPU)
    assert "AdamW" in str(caught.value)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter of the model is trainable"):
        make_optimizer(frozen, "KFAC", Config(), CPU)


def test_terms_are_asked_for_or_counted_from_labels() -> None:
    engine = _engine(_net())
    x, y = _batch()
    with pytest.raises(RunError, match="number of loss terms"):
        engine.backward(nn.functional.cross_entropy(engine(x), y))


def test_accumulated_micro_batches_equal_one_batch() -> None:
    results = []
    for gas in (1, 2, 4):
        model = _net().double()
        engine = _engine(model, gas=gas, damping=0.1)
        for seed in range(4):
            x, y = _batch(seed)
            for part_x, part_y in zip(x.chunk(gas), y.chunk(gas), strict=True):
                engine.backward(nn.functional.cross_entropy(engine(part_x), part_y), terms=8 / gas)
                engine.step()
        results.append(engine.gathered_state_dict())
    for other in results[1:]:
        for name, value in results[0].items():
            assert (other[name] - value).abs().max() <= 1e-10 * value.abs().max(), name


def test_mid_interval_checkpoint_goes_on_exactly(tmp_path: Any) -> None:
    settings = {"factor_interval": 3, "inverse_interval": 6, "tau": 0.1}
    straight = _engine(_net(), **settings)
    for seed in range(12):
        if seed == 7:
            straight.save_checkpoint(tmp_path, "at7", {"note": 1})
        _step(straight, seed)
    resumed = _engine(_net(), **settings)
    assert resumed.load_checkpoint(tmp_path, "at7") == {"note": 1}
    for seed in range(7, 12):
        _step(resumed, seed)
    for name, value in _snapshot(straight).items():
        assert torch.equal(value, _snapshot(resumed)[name]), name


def test_bf16_model_keeps_an_fp32_master() -> None:
    model = _net().bfloat16()
    engine = _engine(model, lr=1e-4, tau=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for seed in range(30):
        _step(engine, seed)
    masters = engine._masters
    assert all(m.dtype == torch.float32 for m in masters.values())
    # Every single update is below half an ulp of bf16; the master keeps their sum.
    assert any((masters[n] - before[n].float()).abs().max() > 0 for n in masters)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name].bfloat16()), name
