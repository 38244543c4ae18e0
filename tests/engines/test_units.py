"""Which modules FSDP2 takes for units, and how tensors are put into buckets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsso import tasks
from dsso.config import ModelConfig, PeftConfig, TaskConfig
from dsso.engines.units import blocks
from dsso.parallel.averaging import average, cut

FAMILIES = {
    "tiny-t5": ("T5Block", 4),
    "tiny-roberta": ("RobertaLayer", 2),
    "tiny-bert": ("BertLayer", 2),
    "tiny-opt": ("OPTDecoderLayer", 2),
    "tiny-llama": ("LlamaDecoderLayer", 2),
}


@pytest.mark.parametrize("peft", ["none", "lora", "adapter", "prefix"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_blocks_of_every_family(name: str, peft: str) -> None:
    config = TaskConfig(max_length=32, train_examples=4, eval_examples=4)
    task = tasks.load_task(config, 0)
    bundle = tasks.models.load(ModelConfig(name=name, init="random"), task, config)
    bundle = tasks.adapters.apply(bundle, PeftConfig(type=peft))
    kind, count = FAMILIES[name]
    assert [type(block).__name__ for block in blocks(bundle.model)] == [kind] * count


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_a_block_with_a_tied_weight_is_left_to_the_root() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Inner(), Inner(), Inner()])
    model.head = nn.Linear(4, 4)
    assert blocks(model) == list(model.layers)
    model.head.weight = model.layers[1].parts[0].weight
    assert blocks(model) == [model.layers[0], model.layers[2]]
    # tied within one block: its own affair
    model.layers[0].parts[1].weight = model.layers[0].parts[0].weight
    assert blocks(model) == [model.layers[0], model.layers[2]]


def test_small_lists_mixed_lists_and_none() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    model.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
    model.mixed = nn.ModuleList([nn.Linear(64, 64), nn.LayerNorm(64)])
    assert blocks(model) == list(model.layers)
    assert blocks(nn.Linear(3, 3)) == []


def test_buckets_hold_neighbours() -> None:
    assert cut([3, 3, 3, 9, 1, 1], 6) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert cut([], 6) == []
    tensors = [torch.ones(2), torch.zeros(3, 1)]
    assert all(a is b for a, b in zip(average(tensors), tensors, strict=True))
