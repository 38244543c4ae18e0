"""The tables of DeepSpeed's keys against what the installed DeepSpeed reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, KeysView
from typing import Any

import pytest

from dsso.ds_keys import FIXED, FIXED_FOR_METHODS, REMOVED, RENAMED, SECTIONS, TOP_LEVEL
from dsso.recipe_models import SCHEDULERS


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    return pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


class _Keys:
    """`keys()` of a recorder: a membership test is a reading."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __contains__(self, key: str) -> bool:
        return key in self.recorder

    def __iter__(self) -> Iterator[str]:
        return iter(self.recorder)


class Recorder(dict[str, Any]):
    """A configuration that remembers which keys were asked for, in all copies of it."""

    asked: set[str]

    def __new__(cls, *args: Any) -> Recorder:
        self = super().__new__(cls)
        self.asked = set()
        return self

    def __copy__(self) -> Recorder:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> KeysView[str]:
        return _Keys(self)  # type: ignore[return-value]


def asked_by_deepspeed(section: str | None = None) -> set[str]:
    """Keys that DeepSpeed's parser asks the top level for, or the given section."""
    from deepspeed.runtime.config import DeepSpeedConfig

    whole, part = Recorder({"train_batch_size": 8}), Recorder()
    if section is not None:
        whole[section] = part
    DeepSpeedConfig(whole)
    return whole.asked if section is None else part.asked


def test_every_key_that_deepspeed_asks_for_is_known(deepspeed: Any) -> None:
    asked = asked_by_deepspeed()
    assert len(asked) > 40, "the recorder lost its readings"
    known = set(TOP_LEVEL) | REMOVED | set(RENAMED)
    assert asked <= known, f"not in dsso.ds_keys: {sorted(asked - known)}"


def test_every_known_key_is_read_somewhere(deepspeed: Any) -> None:
    source = inspect.getsource(deepspeed)
    unread = {key for key in set(TOP_LEVEL) - asked_by_deepspeed() if f'"{key}"' not in source}
    assert not unread, f"in dsso.ds_keys, but not read by DeepSpeed: {sorted(unread)}"


def pydantic_models() -> dict[str, Any]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


# sections that DeepSpeed reads key by key, and keys that it reads only when another is set
READ_BY_KEY = {
    "activation_checkpointing": set(),
    "aio": set(),
    "checkpoint": set(),
    "data_types": set(),
    "flops_profiler": set(),
    "optimizer": {"params"},
    "scheduler": {"params"},
    "torch_autocast": set(),
}


def test_every_checked_section_is_compared(deepspeed: Any) -> None:
    assert set(SECTIONS) == set(pydantic_models()) | set(READ_BY_KEY) | {"timers"}


def test_sections_with_a_model_have_its_fields(deepspeed: Any) -> None:
    for path, model in pydantic_models().items():
        fields = {field.alias or name for name, field in model.model_fields.items()}
        assert fields == SECTIONS[path], f"{path}: {sorted(fields ^ SECTIONS[path])}"


@pytest.mark.parametrize("path", sorted(READ_BY_KEY))
def test_sections_that_are_read_key_by_key(deepspeed: Any, path: str) -> None:
    # `legacy_fusion` belongs to an optimizer that no longer exists
    asked = asked_by_deepspeed(path) - {"legacy_fusion"}
    assert asked | READ_BY_KEY[path] == SECTIONS[path], sorted(asked ^ SECTIONS[path])


def test_removed_keys_are_those_that_deepspeed_refuses(deepspeed: Any) -> None:
    from deepspeed.runtime import config

    theirs = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    theirs |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert theirs == REMOVED


def test_schedulers_take_what_deepspeed_takes(deepspeed: Any) -> None:
    from deepspeed.runtime import lr_schedules

    assert set(SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, model in SCHEDULERS.items():
        taken = set(inspect.signature(getattr(lr_schedules, name)).parameters)
        assert set(model.model_fields) == taken - {"optimizer", "last_batch_iteration"}


def test_paths_of_refused_settings_are_known() -> None:
    for path in FIXED | FIXED_FOR_METHODS:
        section, _, key = path.partition(".")
        assert section in TOP_LEVEL
        assert not key or section not in SECTIONS or key in SECTIONS[section], path
