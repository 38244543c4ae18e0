"""Layers that read the same tensor are found by the tensor, whatever they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsso import tasks
from dsso.config import ModelConfig, PeftConfig, TaskConfig
from dsso.curvature import sharing
from dsso.curvature.layers import split_parameters
from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.errors import RunError
from dsso.optim.kfac import Config

CPU = torch.device("cpu")


class _Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 3, bias=False) for _ in range(3))
        self.biased, self.last = nn.Linear(4, 3), nn.Linear(3, 2, bias=False)
        self.drop = nn.Dropout(dropout)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        other = h.clone() if self.apart else h
        out = self.one(h) + self.two(other) + self.three(self.drop(h)) + self.biased(h)
        return self.last(out)


def _groups(model: nn.Module, through_dropout: bool = False) -> list[set[str]]:
    layers = split_parameters(model).layers
    inputs = sharing.example_inputs(model) or {"x": torch.randn(1, 2, 4)}
    found: dict[int, set[str]] = {}
    for layer, leader in zip(layers, sharing.leaders(model, layers, inputs, through_dropout), strict=True):
        found.setdefault(leader, set()).add(layer.name)
    return sorted((group for group in found.values() if len(group) > 1), key=sorted)


def test_same_tensor_same_group() -> None:
    # A layer with a bias has one more row in its factor.
    assert _groups(_Net()) == [{"one", "two", "three"}]


def test_dropout_sets_apart_unless_it_is_declared_harmless() -> None:
    model = _Net(0.1).train()
    assert _groups(model) == [{"one", "two"}]
    assert _groups(model, through_dropout=True) == [{"one", "two", "three"}]
    assert model.training
    assert model.drop.training


def _bundle(name: str, **peft: object) -> nn.Module:
    config = TaskConfig(max_length=32, train_examples=16, eval_examples=8)
    task = tasks.load_task(config, 0)
    bundle = tasks.models.load(ModelConfig(name=name, init="random", dropout=0.0), task, config)
    return tasks.adapters.apply(bundle, PeftConfig(**peft)).model


def test_attention_and_feed_forward_of_known_families() -> None:
    llama = _groups(_bundle("tiny-llama"))
    assert {f"model.layers.0.self_attn.{one}_proj" for one in "qkv"} in llama
    assert {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"} in llama
    bert = _groups(_bundle("tiny-bert"))
    assert len(bert) == 2
    assert all(len(group) == 3 for group in bert)
    opt = _groups(_bundle("tiny-opt"))
    assert all({name.rsplit(".", 1)[1] for name in group} == {"q_proj", "k_proj", "v_proj"} for group in opt)


def test_all_cross_attentions_of_an_encoder_decoder_read_one_tensor() -> None:
    groups = _groups(_bundle("tiny-t5", type="lora", r=4, alpha=8.0, targets=["q", "v"]))
    cross = [group for group in groups if any("EncDecAttention.v" in name for name in group)]
    assert len(cross) == 1
    assert all("EncDecAttention.v.lora_A" in name for name in cross[0])
    layers = {name.split(".block.")[1].split(".")[0] for name in cross[0]}
    assert len(layers) == len(cross[0]) > 1


def test_lora_dropout_is_seen() -> None:
    assert _groups(_bundle("tiny-bert", type="lora", r=4, alpha=8.0, lora_dropout=0.1)) == []


def test_layers_that_part_later_end_the_run_with_a_message() -> None:
    """Measured factors are never those of another tensor."""
    model = _Net()
    config = Config(factor_interval=1)
    optimizer = make_optimizer(model, "KFAC", config, CPU, example={"x": torch.randn(1, 2, 4)})
    engine = SingleEngine(model, optimizer, CPU, 1, 1)
    engine.train()
    engine.backward(engine(torch.randn(2, 3, 4)).square().mean(), terms=6)
    engine.step()
    model.apart = True
    with pytest.raises(RunError, match=r"one and two(.|\n)*share_inputs"):
        engine(torch.randn(2, 3, 4))


@pytest.mark.parametrize("share", ["auto", "off"])
def test_a_shared_factor_is_the_own_one(share: str) -> None:
    torch.manual_seed(0)
    model = _Net().double()
    config = Config(factor_interval=1, share_inputs=share, stagger=False)
    optimizer = make_optimizer(model, "KFAC", config, CPU, example={"x": torch.randn(1, 2, 4).double()})
    engine = SingleEngine(model, optimizer, CPU, 1, 1)
    engine.train()
    x = torch.randn(2, 3, 4).double()
    engine.backward(engine(x).square().mean(), terms=6)
    engine.step()
    rows = torch.tanh(x).reshape(-1, 4)
    method = optimizer.method
    assert len({layer.a.key for layer in method.placement.layers}) == (3 if share == "auto" else 5)
    for layer in method.placement.layers[:3]:
        torch.testing.assert_close(method.factors[layer.a.key].matrix(), rows.mT @ rows / 6)
