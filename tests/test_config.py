"""The models of the "dsso" section: defaults, combinations, and every message."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from dsso.config import (
    DssoConfig,
    ModelConfig,
    PeftConfig,
    StrictModel,
    TaskConfig,
    TrainConfig,
    parse,
    problem,
)
from dsso.errors import RecipeError

MODELS = [DssoConfig, ModelConfig, PeftConfig, TaskConfig, TrainConfig]


def message(section: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(DssoConfig, section, "dsso")
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_documented(model: type[StrictModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no docstring"


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        (
            {"modle": {}},
            ["dsso.modle: unknown key", "got: 'modle'", "nearest: 'model'", "allowed: comment, engine"],
        ),
        ({"model": {"nam": "x", "name": "y"}}, ["dsso.model.nam: unknown key", "nearest: 'name'"]),
        ({"model": {}}, ["dsso.model.name: is required and missing", "remedy: add 'name' to dsso.model"]),
        ({"model": {"name": ""}}, ["dsso.model.name: has a wrong type or value", "at least 1 character"]),
        ({"model": "t5"}, ["dsso.model: must be an object", "got: 't5'"]),
        (
            {"model": {"name": "x", "dtype": "bf16"}},
            ["dsso.model.dtype: is not one of the options", "allowed: auto, float32, bfloat16, float16"],
        ),
        ({"model": {"name": "x", "dropout": 1.0}}, ["dsso.model.dropout", "allowed: less than 1"]),
        ({"engine": "fsdp3"}, ["dsso.engine: is not one of the options", "nearest: 'fsdp2'"]),
        ({"engine": "deepsped"}, ["dsso.engine: is not one of the options", "nearest: 'deepspeed'"]),
        ({"engine": []}, ["dsso.engine: is not one of the options", "got: []"]),
        ({"peft": {"type": "lora", "r": 0}}, ["dsso.peft.r", "got: 0", "greater than or equal to 1"]),
        ({"peft": {"type": "lora", "alpha": 0}}, ["dsso.peft.alpha", "greater than 0"]),
        ({"peft": {"type": "lora", "targets": []}}, ["dsso.peft.targets", "at least 1 item"]),
        ({"peft": {"type": "lorra"}}, ["dsso.peft.type", "nearest: 'lora'"]),
        (
            {"peft": {"type": "adapter", "r": 4}},
            [
                "dsso.peft: 'r' has no meaning for type 'adapter'",
                "got: 'r'",
                "allowed: variant, bottleneck, activation, modules_to_save",
                "remedy: remove it, or set dsso.peft.type to 'lora'",
            ],
        ),
        ({"peft": {"bottleneck": 4}}, ["no meaning for type 'none'", "allowed: no other field", "'adapter'"]),
        ({"peft": {"type": "prefix", "variant": "houlsby"}}, ["no meaning for type 'prefix'"]),
        ({"task": {"verbalizer": ["yes"]}}, ["dsso.task.verbalizer", "at least 2 items", "got: ['yes']"]),
        ({"task": {"max_length": 0}}, ["dsso.task.max_length", "greater than or equal to 1"]),
        ({"task": {"columns": {"a": 1}}}, ["dsso.task.columns.a", "got: 1", "allowed: string"]),
        (
            {"train": {}},
            ["dsso.train: exactly one of max_steps and epochs", "remedy: set dsso.train.max_steps"],
        ),
        ({"train": {"max_steps": 1, "epochs": 1}}, ["exactly one", "max_steps=1, epochs=1.0"]),
        ({"train": {"max_steps": "10"}}, ["dsso.train.max_steps", "got: '10'", "allowed: integer"]),
        ({"train": {"max_steps": True}}, ["dsso.train.max_steps", "got: True", "allowed: integer"]),
        ({"train": {"epochs": 0}}, ["dsso.train.epochs", "greater than 0"]),
        ({"train": {"epochs": float("inf")}}, ["dsso.train.epochs", "finite number"]),
        ({"train": {"max_steps": 1, "seed": -1}}, ["dsso.train.seed", "greater than or equal to 0"]),
        ({"train": {"max_steps": 1, "patience": 0}}, ["dsso.train.patience"]),
    ],
)
def test_what_is_wrong_is_told_with_place_and_remedy(section: dict[str, Any], parts: list[str]) -> None:
    told = message(section)
    for part in parts:
        assert part in told, told


def test_all_that_is_wrong_is_told_at_once() -> None:
    told = message({"model": {"name": "x", "dropout": "0.1"}, "task": {"nam": "rte"}})
    assert "dsso.model.dropout" in told
    assert "dsso.task.nam" in told


def test_defaults_are_valid_and_sections_may_be_left_out() -> None:
    config = parse(DssoConfig, {}, "dsso")
    assert config == DssoConfig()
    assert (config.engine, config.task.name, config.train.epochs) == ("deepspeed", "builtin", 3.0)


@pytest.mark.parametrize(
    ("peft", "kept"),
    [
        ({"type": "none"}, {"type"}),
        ({"type": "lora", "r": 4}, {"type", "r", "alpha", "lora_dropout", "targets", "modules_to_save"}),
        ({"type": "adapter"}, {"type", "variant", "bottleneck", "activation", "modules_to_save"}),
        ({"type": "prefix"}, {"type", "num_virtual_tokens", "prefix_projection", "modules_to_save"}),
    ],
)
def test_what_is_written_can_be_read_again(peft: dict[str, Any], kept: set[str]) -> None:
    config = parse(DssoConfig, {"peft": peft}, "dsso")
    written = config.model_dump(mode="json")
    assert set(written["peft"]) == kept
    assert parse(DssoConfig, written, "dsso") == config


def test_models_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        DssoConfig().engine = "single"  # type: ignore[misc]


def test_a_section_that_is_no_object_is_told() -> None:
    with pytest.raises(RecipeError, match=r"dsso: must be an object\n  got: \[1\]"):
        parse(DssoConfig, [1], "dsso")


def test_a_value_that_json_does_not_know_is_told() -> None:
    with pytest.raises(RecipeError, match=r"dsso: cannot be written as JSON"):
        parse(DssoConfig, {"comment": {1, 2}}, "dsso")


def test_an_array_fills_a_tuple_and_braces_stay_as_they_are() -> None:
    class Pair(StrictModel):
        betas: tuple[float, float] = (0.9, 0.99)

        @pydantic.field_validator("betas")
        @classmethod
        def _ordered(cls, betas: tuple[float, float]) -> tuple[float, float]:
            if betas[0] > betas[1]:
                raise problem(
                    "betas must grow, as {this} does not", got=list(betas), allowed="b1 <= b2", remedy="swap"
                )
            return betas

    assert parse(Pair, {"betas": [0.1, 0.2]}, "p").betas == (0.1, 0.2)
    with pytest.raises(RecipeError) as caught:
        parse(Pair, {"betas": [0.2, 0.1]}, "p")
    assert str(caught.value).splitlines() == [
        "p.betas: betas must grow, as {this} does not",
        "  got: [0.2, 0.1]",
        "  allowed: b1 <= b2",
        "  remedy: swap",
    ]
