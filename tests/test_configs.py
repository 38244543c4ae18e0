"""Every recipe in configs/ is valid, says what it is for, and is called what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsso.optim import available, is_forward
from dsso.optim.kfac import Config
from dsso.recipe import Recipe, load_recipe
from dsso.recipe_models import BASELINES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.json"))
SMALL = ("tiny", "minilm")
"""Models whose recipes run on a CPU, on one rank or two."""

TITLES = {
    "KFAC": "K-FAC",
    "EKFAC": "EKFAC",
    "SHAMPOO": "Shampoo",
    "SOAP": "SOAP",
    "PSGD": "PSGD",
    "SOPHIA": "Sophia",
    "GAUSS_NEWTON": "Gauss-Newton",
    "MEZO": "MeZO",
    "ZO_ADAM": "MeZO-Adam",
    "ZO_ADAMM": "ZO-AdaMM",
    "ZO_ADAMU": "ZO-AdaMU",
    "HIZOO": "HiZOO",
}
"""How comments write methods."""

by_name = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def parts(file: Path) -> tuple[str, list[str]]:
    """Method, and the words behind it: model, how it is trained, and what else tells the recipe apart."""
    names = sorted((name.lower() for name in [*available(), *BASELINES]), key=len, reverse=True)
    method = next((name for name in names if file.stem.startswith(f"{name}_")), file.stem)
    return method, file.stem.removeprefix(method).strip("_").split("_")


def of(method: str) -> pytest.MarkDecorator:
    """The recipes of one method."""
    files = [file for file in FILES if parts(file)[0] == method]
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


def is_small(file: Path) -> bool:
    return parts(file)[1][0] in SMALL


def ranks(file: Path) -> list[int]:
    """Numbers of ranks that a recipe is made for."""
    if file.stem.endswith("_single"):
        return [1]
    return [1, 2] if is_small(file) else [1, 2, 4, 8]


@pytest.mark.parametrize("model", ["t5_3b", "roberta_large"])
@pytest.mark.parametrize("peft", ["lora", "adapter"])
@pytest.mark.parametrize("method", ["kfac", "adamw"])
def test_the_large_models_have_their_recipes(method: str, model: str, peft: str) -> None:
    recipe = load_recipe(CONFIGS / f"{method}_{model}_{peft}.json")
    assert recipe.dsso.peft.type == peft
    assert recipe.precision.dtype == "bfloat16"
    assert recipe.raw["train_batch_size"] == 128


@pytest.mark.parametrize("model", ["opt_13b", "t5_3b"])
def test_the_large_models_have_their_recipes_without_gradients(model: str) -> None:
    recipe = load_recipe(CONFIGS / f"mezo_{model}_full_zero3.json")
    assert (recipe.dsso.engine, recipe.zero_stage, recipe.precision.dtype) == ("deepspeed", 3, "bfloat16")
    assert recipe.dsso.peft.type == "none"


@by_name
def test_it_resolves_and_reads_back_to_itself(file: Path) -> None:
    recipe = load_recipe(file)
    for world_size in ranks(file):
        resolved = recipe.resolved(world_size)
        assert resolved.micro_batch * resolved.gas * world_size == resolved.global_batch
        written = json.loads(json.dumps(resolved.to_json()))
        assert load_recipe(written).resolved(world_size).to_json() == resolved.to_json()


@by_name
def test_nothing_is_left_to_guess(file: Path) -> None:
    def autos(value: Any) -> bool:
        if isinstance(value, dict):
            return any(autos(inner) for inner in value.values())
        return value == "auto"

    assert not autos(load_recipe(file).resolved(ranks(file)[-1]).ds_config)


@by_name
def test_deepspeed_parses_what_it_gets(file: Path) -> None:
    config = pytest.importorskip("deepspeed.runtime.config", reason="DeepSpeed is not installed")
    resolved = load_recipe(file).resolved(1)
    parsed = config.DeepSpeedConfig(resolved.ds_config)
    assert parsed.zero_optimization_stage == resolved.zero_stage
    assert parsed.train_micro_batch_size_per_gpu == resolved.micro_batch
    assert parsed.gradient_accumulation_steps == resolved.gas
    assert parsed.gradient_clipping == resolved.ds_config["gradient_clipping"]
    assert parsed.bfloat16_config.enabled == (resolved.precision.dtype == "bfloat16")
    assert parsed.float16_config.enabled == (resolved.precision.dtype == "float16")


@by_name
def test_its_name_and_its_comment_say_what_it_is(file: Path) -> None:
    recipe = load_recipe(file)
    method, words = parts(file)
    assert method == recipe.optimizer_type.lower()
    assert recipe.dsso.comment
    told = TITLES.get(recipe.optimizer_type, "")
    assert told in recipe.dsso.comment
    model = recipe.dsso.model.name.lower().replace("-", "_")
    named = "_".join(words[:1] if words[0] == "minilm" else words[:2])
    assert named in model
    kinds = {"full": "none", "lora": "lora", "adapter": "adapter", "prefix": "prefix"}
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    for word in words:
        assert word not in kinds or kinds[word] == recipe.dsso.peft.type
        assert word not in {"builtin", "mrpc", "stsb", "rte"} or word == recipe.dsso.task.name
        assert word not in dtypes or dtypes[word] == recipe.precision.dtype
        assert not word.startswith("zero") or int(word.removeprefix("zero")) == recipe.zero_stage
        assert word != "single" or recipe.dsso.engine == "single"


def but_for_the_method(recipe: Recipe) -> dict[str, Any]:
    """What a fair comparison holds fixed."""
    written = recipe.resolved(1).to_json()
    for key in ("optimizer", "gradient_clipping"):
        del written[key]
    written["dsso"].pop("comment")
    written["zero_optimization"].pop("sub_group_size", None)
    if "scheduler" in written:
        written["scheduler"]["params"].pop("warmup_max_lr")
    return written


@of("adamw")
def test_a_baseline_differs_from_its_method_in_the_optimizer_only(file: Path) -> None:
    rival = load_recipe(CONFIGS / file.name.replace("adamw", "kfac", 1))
    assert but_for_the_method(load_recipe(file)) == but_for_the_method(rival)


@of("kfac")
def test_curvature_is_refreshed_early_and_the_newton_step_is_clipped(file: Path) -> None:
    params = load_recipe(file).optimizer_config
    assert isinstance(params, Config)
    assert params.clip == "post"
    for interval in (params.factor_interval, params.inverse_interval):
        assert all(interval.due(step) for step in range(4))
        assert interval.current(10**6) != 1, "a refresh on every step to the end costs more than the step"
    for step in range(10**4):
        refreshed = params.inverse_interval.due(step)
        assert not refreshed or params.factor_interval.due(step), "nothing new to factorize"


def test_the_tests_have_every_stage_and_number_format() -> None:
    tiny = [load_recipe(file) for file in FILES if parts(file)[1][0] == "tiny"]
    kfac = [recipe for recipe in tiny if recipe.optimizer_type == "KFAC"]
    assert {recipe.zero_stage for recipe in kfac} == {0, 1, 2, 3}
    assert {recipe.precision.dtype for recipe in kfac} == {"float32", "bfloat16", "float16"}
    assert {recipe.dsso.peft.type for recipe in kfac} == {"none", "lora", "adapter", "prefix"}
    assert {recipe.dsso.engine for recipe in kfac} == {"deepspeed", "single"}


@pytest.mark.parametrize("kind", [name for name in available() if is_forward(name)])
def test_every_method_without_gradients_has_a_test(kind: str) -> None:
    recipes = [load_recipe(file) for file in FILES if parts(file)[1][0] == "tiny"]
    assert any(recipe.optimizer_type == kind for recipe in recipes)
