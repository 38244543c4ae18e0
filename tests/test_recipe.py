"""Recipes: reading, overriding, filling in, and what DeepSpeed gets in the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsso import __main__, optim, recipe_docs
from dsso.errors import RecipeError
from dsso.recipe import load_recipe
from tests.recipes import ADAMW, BASE, load, message

ROOT = Path(__file__).resolve().parents[1]


def test_a_missing_file_is_told_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "kfac_rte.json").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "kfac_rt.json")
    assert "there is no such file" in str(caught.value)
    assert f"did you mean {tmp_path / 'kfac_rte.json'}?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            '{\n  "train_batch_size": 8,\n  "optimizer": {,}\n}',
            [":3:17", "is not JSON", "got: '\"optimizer\": {,}'"],
        ),
        ("", [":1:1", "is not JSON", "an empty file"]),
        ('{"a": 1', [":1:8", "is not JSON"]),
        ("[1]", ["must hold one JSON object", "got: [1]"]),
        ('{"a": 1, "a": 2}', ["a key is given twice", "got: 'a'"]),
        ('{"train_batch_size": NaN}', ["is no number in JSON", "got: 'NaN'"]),
    ],
)
def test_a_broken_file_is_told_with_line_and_column(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    for part in [str(file), *parts]:
        assert part in str(caught.value), str(caught.value)


def test_a_file_that_is_no_text_and_a_directory_are_told(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.json", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path)


def test_an_object_that_is_no_json_is_told() -> None:
    with pytest.raises(RecipeError, match="recipe: cannot be written as JSON"):
        load_recipe({**BASE, "wandb": {"group": {1, 2}}})


def test_overrides_set_values_of_any_type_and_make_sections() -> None:
    recipe = load_recipe(
        BASE,
        [
            "optimizer.params.damping=0.5",
            "optimizer.params.inverse_interval=[[0,1],[9,null]]",
            "dsso.task.name=mrpc",
            "dsso.peft.type=lora",
            'dsso.peft.targets=["q"]',
            "dsso.task.prompt=a=b",
        ],
    )
    assert recipe.optimizer_config.damping == 0.5  # type: ignore[attr-defined]
    assert not recipe.optimizer_config.inverse_interval.due(9)  # type: ignore[attr-defined]
    assert (recipe.dsso.task.name, recipe.dsso.task.prompt) == ("mrpc", "a=b")
    assert recipe.dsso.peft.targets == ["q"]
    assert "task" not in BASE["dsso"], "the caller's object is not touched"


def test_null_removes_a_key_unless_null_is_a_value() -> None:
    written = {
        **BASE,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "round_robin_gradients": True},
        "dsso": {"train": {"max_steps": 100, "patience": 3}, "peft": {"type": "lora", "alpha": 8, "r": 4}},
    }
    recipe = load_recipe(
        written,
        [
            "dsso.peft.alpha=null",
            "dsso.peft.r=null",
            "dsso.peft.type=none",
            "dsso.train.patience=null",
            "dsso.task.max_length=null",
            "gradient_clipping=null",
            "train_micro_batch_size_per_gpu=null",
            "zero_optimization.round_robin_gradients=null",
            "optimizer.params.lr=null",
            "optimizer.params.block_side=null",
            "optimizer.params.base.momentum=null",
        ],
    )
    assert recipe.dsso.peft.type == "none" and recipe.dsso.train.patience is None
    assert recipe.raw["zero_optimization"] == {"stage": 1}
    assert not {"gradient_clipping", "train_micro_batch_size_per_gpu"} & set(recipe.raw)
    params: Any = recipe.optimizer_config
    assert params.lr == optim.resolve("KFAC").Config().lr
    assert params.block_side is None, "null has a meaning of its own here"
    assert written["gradient_clipping"] == 1.0, "the caller's object is not touched"


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("dsso.peft.alpha", {"dsso": {"peft": {"type": "none", "alpha": 8.0}}}),
        ("zero_optimization.round_robin_gradients", {"zero_optimization": {"round_robin_gradients": True}}),
        ("gradient_allreduce_op", {"gradient_allreduce_op": "sum"}),
        ("steps_per_print", {"dsso": {"engine": "ddp"}, "steps_per_print": 3, "dump_state": True}),
    ],
)
def test_a_remedy_that_says_how_to_remove_works(path: str, base: dict[str, Any]) -> None:
    whole = {**BASE, **base}
    with pytest.raises(RecipeError) as caught:
        load_recipe(whole)
    told = str(caught.value)
    path = "dump_state" if "dump_state" in whole else path
    assert f"(on the command line, --set {path}=null removes it)" in told
    load_recipe(whole, [f"{path}=null"])


def test_both_halves_of_a_recipe_are_told_together() -> None:
    told = message({"optimizer.params.dampin": 1, "dsso.train.max_step": 1})
    assert "optimizer.params.dampin: unknown key" in told and "dsso.train.max_step: unknown key" in told


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("dsso.train.max_step=null", ["dsso.train.max_step: unknown key"]),
        ("optimizer.params.dampin=null", ["optimizer.params.dampin: unknown key"]),
        ("gradient_cliping=null", ["gradient_cliping: unknown key", "nearest: 'gradient_clipping'"]),
        ("lr", ["--set: is no override", "got: 'lr'", "allowed: path.to.key=value"]),
        ("=3", ["--set: is no override"]),
        ("dsso..x=3", ["--set: is no override"]),
        (
            "train_batch_size.x=3",
            ["--set: train_batch_size is no object, so train_batch_size.x cannot be set"],
        ),
        ("optimizer.params.tua=3", ["optimizer.params.tua: unknown key", "nearest: 'tau'"]),
    ],
)
def test_a_wrong_override_is_told(override: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(BASE, [override])
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_method_is_taken_out_and_deepspeed_neither_clips_nor_refuses() -> None:
    resolved = load({}).resolved(2)
    ds = resolved.ds_config
    assert "optimizer" not in ds
    assert "dsso" not in ds
    assert ds["gradient_clipping"] == 0.0
    assert ds["zero_allow_untested_optimizer"] is True
    assert ds["zero_optimization"] == {"stage": 1}
    assert resolved.is_method
    assert isinstance(resolved.optimizer_config, optim.resolve("KFAC").Config)


def test_stage_3_holds_all_trainables_in_one_sub_group_for_methods_only() -> None:
    changes = {"zero_optimization.stage": 3}
    assert load(changes).resolved(1).ds_config["zero_optimization"] == {"stage": 3, "sub_group_size": 10**12}
    assert load(changes, ADAMW).resolved(1).ds_config["zero_optimization"] == {"stage": 3}


def test_a_baseline_keeps_its_optimizer_and_its_clipping_is_explicit() -> None:
    ds = load({}, ADAMW).resolved(1).ds_config
    assert ds["optimizer"]["type"] == "AdamW"
    assert ds["optimizer"]["params"]["lr"] == 0.001
    assert ds["gradient_clipping"] == 0.0, "DeepSpeed's own default would clip at 1"
    assert load({"gradient_clipping": 1}, ADAMW).resolved(1).ds_config["gradient_clipping"] == 1.0
    told = message({"gradient_clipping": "auto"}, ADAMW)
    assert "gradient_clipping: 'auto' cannot be filled in for AdamW" in told


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({"type": "AdamW", "params": {"betas": [0.9, 1.0]}}, "betas are out of range"),
        ({"type": "AdamW", "params": {"betas": [0.9]}}, "optimizer.params.betas"),
        ({"type": "SGD", "params": {"nesterov": True}}, "nesterov needs momentum"),
        ({"type": "SGD", "params": {"betas": [0.9, 0.99]}}, "optimizer.params.betas: unknown key"),
        ({"type": "Adam", "params": {"lr": 0}}, "greater than 0"),
    ],
)
def test_baselines_are_checked_too(params: dict[str, Any], part: str) -> None:
    assert part in message({"optimizer": params})


def test_names_of_optimizers_do_not_depend_on_case() -> None:
    assert load({"optimizer.type": "kfac"}).optimizer_type == "KFAC"
    assert load({"optimizer.type": "adamw"}, ADAMW).optimizer_type == "AdamW"


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ((16, "auto", "auto"), 2, (8, 1, 16)),
        ((16, 2, "auto"), 2, (2, 4, 16)),
        ((16, "auto", 4), 2, (2, 4, 16)),
        (("auto", 2, 4), 2, (2, 4, 16)),
        ((None, 2, None), 4, (2, 1, 8)),
        ((16, 2, 4), 2, (2, 4, 16)),
        ((16, None, None), 1, (16, 1, 16)),
    ],
)
def test_batch_sizes_are_filled_in(
    sizes: tuple[Any, Any, Any], ranks: int, expected: tuple[int, int, int]
) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    base = {key: value for key, value in BASE.items() if key != "train_batch_size"}
    given = {name: size for name, size in zip(names, sizes, strict=True) if size is not None}
    resolved = load_recipe(base | given).resolved(ranks)
    assert (resolved.micro_batch, resolved.gas, resolved.global_batch) == expected
    assert tuple(resolved.ds_config[name] for name in names) == (expected[2], expected[0], expected[1])


@pytest.mark.parametrize(
    ("changes", "ranks", "parts"),
    [
        ({"train_batch_size": 10}, 4, ["train_batch_size: the batch of 10 cannot be cut", "a multiple of 4"]),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            4,
            ["16 cannot be cut into 4 ranks x 2 accumulation steps x 4 examples", "4 x 2 x 4 = 32"],
        ),
        ({"train_micro_batch_size_per_gpu": 3}, 2, ["a multiple of 6", "remedy: change train_batch_size"]),
        ({"train_batch_size": 2}, 4, ["the batch of 2 cannot be cut into 4 ranks"]),
        ({"train_batch_size": 0}, 1, ["train_batch_size: is no batch size", "an integer >= 1"]),
        ({"train_batch_size": ...}, 1, ["train_batch_size: no batch size is given", "remedy: set"]),
        (
            {"train_batch_size": "auto", "gradient_accumulation_steps": 2},
            1,
            ["gradient_accumulation_steps: is given without a batch size"],
        ),
    ],
)
def test_batch_sizes_that_do_not_fit_are_told(changes: dict[str, Any], ranks: int, parts: list[str]) -> None:
    told = message(changes, ranks=ranks)
    for part in parts:
        assert part in told, told


def test_the_single_engine_has_one_process() -> None:
    told = message({"dsso.engine": "single", "zero_optimization": ...}, ranks=2)
    assert "dsso.engine: the engine 'single' has one process, and 2 were started" in told


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


def test_the_scheduler_is_filled_in_from_the_length_of_the_run() -> None:
    params = load(scheduler("WarmupDecayLR")).resolved(1).ds_config["scheduler"]["params"]
    assert params == {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.05,
        "warmup_num_steps": 6,
        "warmup_type": "linear",
        "total_num_steps": 100,
    }
    assert (
        load(scheduler("WarmupDecayLR"))
        .resolved(1, steps=300)
        .ds_config["scheduler"]["params"]["total_num_steps"]
        == 300
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            scheduler("WarmupDecayLR") | {"dsso.train": {"epochs": 1}},
            ["scheduler.params.total_num_steps: 'auto'", "dsso.train.epochs", "set dsso.train.max_steps"],
        ),
        (
            scheduler("WarmupDecayLR", total_num_steps=50),
            ["the learning rate is zero from step 50 on, and the run has 100 steps", "remedy: write 'auto'"],
        ),
        (
            scheduler("WarmupLR", warmup_max_lr=0.1),
            ["scheduler.params.warmup_max_lr", "overrides optimizer.params.lr, which is 0.05", "got: 0.1"],
        ),
        (scheduler("WarmupDecayLR", warmup_num_steps=101), ["the warm-up is longer", "got: 101"]),
    ],
)
def test_a_scheduler_that_cannot_be_meant_is_told(changes: dict[str, Any], parts: list[str]) -> None:
    told = message(changes, ranks=1)
    for part in parts:
        assert part in told, told


def test_auto_in_zero_is_left_to_deepspeed() -> None:
    zero = load({"zero_optimization.reduce_bucket_size": "auto"}).resolved(1).ds_config["zero_optimization"]
    assert zero == {"stage": 1}


@pytest.mark.parametrize(
    ("changes", "dtype", "accumulation", "scale"),
    [
        ({}, "float32", "float32", "none"),
        ({"bf16.enabled": True}, "bfloat16", "bfloat16", "none"),
        ({"bf16.enabled": True, "data_types.grad_accum_dtype": "fp32"}, "bfloat16", "float32", "none"),
        ({"fp16.enabled": True}, "float16", "float16", "dynamic"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "float16", "float16", 128.0),
        (
            {"bf16.enabled": "auto", "dsso.model": {"name": "m", "dtype": "bfloat16"}},
            "bfloat16",
            "bfloat16",
            "none",
        ),
        (
            {"bf16.enabled": "auto", "dsso.model": {"name": "m", "dtype": "float32"}},
            "float32",
            "float32",
            "none",
        ),
        ({"dsso.model": {"name": "m", "dtype": "float16"}}, "float16", "float16", "dynamic"),
    ],
)
def test_precision(changes: dict[str, Any], dtype: str, accumulation: str, scale: object) -> None:
    resolved = load(changes).resolved(1)
    precision = resolved.precision
    assert (precision.dtype, precision.accumulation, precision.loss_scale) == (dtype, accumulation, scale)
    assert str(precision.torch_dtype) == f"torch.{dtype}"
    for name, full in (("bf16", "bfloat16"), ("fp16", "float16")):
        assert resolved.ds_config.get(name, {}).get("enabled", False) == (full == dtype)


@pytest.mark.parametrize("base", [BASE, ADAMW])
def test_the_resolved_recipe_reads_back_to_itself(base: dict[str, Any]) -> None:
    changes = scheduler("WarmupDecayLR") | {"zero_optimization.stage": 3, "bf16.enabled": True}
    resolved = load(changes, base).resolved(2)
    written = json.loads(json.dumps(resolved.to_json()))
    assert load_recipe(written).resolved(2).to_json() == resolved.to_json()


def test_the_schema_names_what_is_allowed() -> None:
    schema = recipe_docs.json_schema()
    assert set(schema["properties"]) >= {
        "train_batch_size",
        "optimizer",
        "scheduler",
        "zero_optimization",
        "dsso",
    }
    kinds = [option["properties"]["type"]["const"] for option in schema["properties"]["optimizer"]["oneOf"]]
    assert kinds == [*optim.available(), "AdamW", "Adam", "SGD"]
    text = json.dumps(schema)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/$defs/')[1:]}:
        assert reference in schema["$defs"]
    choices = schema["properties"]["optimizer"]["oneOf"]
    params = {one["properties"]["type"]["const"]: one["properties"]["params"]["$ref"] for one in choices}
    kfac = schema["$defs"][params["KFAC"].split("/")[-1]]
    assert kfac["properties"]["factor_interval"]["default"] == [[0, 1], [20, 10]]


def test_the_command_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(BASE))
    bad.write_text(json.dumps(BASE | {"gradient_cliping": 1}))
    assert __main__.main([str(good)]) == 0
    assert __main__.main([str(good), "--set", "optimizer.params.tau=0"]) == 2
    assert __main__.main([str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert "KFAC, ZeRO stage 1, float32" in captured.out
    assert "gradient_cliping: unknown key" in captured.err


def test_the_schema_is_printed_by_the_module() -> None:
    command = [sys.executable, "-m", "dsso", "--schema"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(printed.stdout) == recipe_docs.json_schema()


def test_the_page_of_the_recipe_is_up_to_date(tmp_path: Path) -> None:
    page = ROOT / "docs" / "recipe.md"
    text = page.read_text(encoding="utf-8")
    assert recipe_docs.fill(text) == text, "run: python -m dsso --update docs/recipe.md"
    stale = tmp_path / "recipe.md"
    stale.write_text(text.replace("| `tau` |", "| `tua` |"), encoding="utf-8")
    assert __main__.main(["--update", str(stale)]) == 0
    assert stale.read_text(encoding="utf-8") == text


def test_a_default_that_is_made_is_told() -> None:
    kfac = recipe_docs.reference().split("### `optimizer.params of KFAC`")[1].split("###")[0]
    row = next(line for line in kfac.splitlines() if line.startswith("| `exclude` |"))
    assert row.split(" | ")[2] == "`[]`"


def test_a_section_that_may_be_left_out_has_a_row_and_a_table() -> None:
    text = recipe_docs.reference()
    assert "<class" not in text
    assert "| `adaptive_tau` | object (see below) or null | `null` |" in text
    table = text.split("### `optimizer.params.adaptive_tau of KFAC`")[1].split("###")[0]
    assert "| `quantile` | number, > 0, < 1 | `0.9` |" in table


def test_the_examples_of_the_page_are_valid() -> None:
    blocks = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").split("```json\n")[1:]
    whole, *fields = (block.split("```")[0] for block in blocks)
    recipe = load_recipe(json.loads(whole))
    assert recipe.dsso.model.name == "minilm"
    assert len(fields) == 2
    for text in fields:
        params = json.loads("{" + text + "}")
        assert load({f"optimizer.params.{name}": value for name, value in params.items()})
