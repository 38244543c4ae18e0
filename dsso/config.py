"""The `"dsso"` section of a recipe as pydantic models, and how their errors are told.

Every model is strict: an unknown key is an error with the nearest known one, a number in quotes is no number,
NaN and infinity are no values. The docstring under a field is what the field reference in the manual shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar, get_args

import pydantic
from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from dsso.errors import RecipeError


class StrictModel(pydantic.BaseModel):
    """Base of every configuration model: unknown keys forbidden, no coercion, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def problem(
    what: str, *, got: object = None, allowed: str | list[str] | None = None, remedy: str | None = None
) -> PydanticCustomError:
    """An error for validators to raise; `parse` turns it into a `RecipeError` with the same parts.

    Args:
        what: one sentence that says what is wrong.
        got: the offending value, when it is not the field's own.
        allowed: what would have been accepted.
        remedy: one sentence that says what to do.
    """
    parts = {"got": got, "allowed": allowed, "remedy": remedy}
    context = {name: part for name, part in parts.items() if part is not None}
    # pydantic fills {names} of the template from the context: the sentence is passed as one of them
    return PydanticCustomError("dsso", "{what}", {"what": what, **context})


def removal(path: str, otherwise: str = "") -> str:
    """How a key leaves a recipe, for a remedy.

    Args:
        path: of the key.
        otherwise: what else would do.
    """
    return f"remove it{otherwise} (on the command line, --set {path}=null removes it)"


class ModelConfig(StrictModel):
    """Which model is trained, and in which form it is loaded."""

    name: str = Field(min_length=1)
    """Hub name, local path, or a built-in: tiny-t5, tiny-roberta, tiny-bert, tiny-opt, tiny-llama, minilm."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes the architecture alone and draws the weights from `dsso.train.seed`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` follows the sections `bf16` and `fp16`, others must agree with them."""
    gradient_checkpointing: Literal["none", "reentrant", "non_reentrant"] = "none"
    """Recompute activations in the backward pass, with either implementation of torch."""
    attention: str | None = None
    """Attention implementation of transformers (`eager`, `sdpa`, …); null leaves the choice to the model."""
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Probability that replaces every dropout probability of the model; null keeps the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""


_PEFT_FIELDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "lora": ("r", "alpha", "lora_dropout", "targets", "modules_to_save"),
    "adapter": ("variant", "bottleneck", "activation", "modules_to_save"),
    "prefix": ("num_virtual_tokens", "prefix_projection", "modules_to_save"),
}


class PeftConfig(StrictModel):
    """Which parameters are trained: all of them, or those of a small addition."""

    type: Literal["none", "lora", "adapter", "prefix"] = "none"
    """`none` trains every parameter; the others freeze the model and train what they add."""
    r: int = Field(default=8, ge=1)
    """lora: rank of the two factors; at most the smaller side of the smallest target."""
    alpha: float = Field(default=16.0, gt=0.0)
    """lora: the product is scaled by `alpha / r`."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """lora: dropout probability at the input of the low-rank branch."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """lora: ends of module names that get a branch; null takes the attention projections of the family."""
    variant: Literal["houlsby", "pfeiffer"] = "houlsby"
    """adapter: behind attention and feed-forward (`houlsby`), or behind feed-forward only (`pfeiffer`)."""
    bottleneck: int = Field(default=64, ge=1)
    """adapter: width of the narrow layer."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """adapter: non-linearity between the two projections."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    """prefix: length of the learnt prefix in tokens."""
    prefix_projection: bool = False
    """prefix: learn the prefix through a two-layer perceptron."""
    modules_to_save: list[str] | None = Field(default=None, min_length=1)
    """Ends of names of modules that are trained as well; null takes the classification head, if any."""

    @model_validator(mode="after")
    def _only_fields_of_the_type(self) -> Self:
        own = _PEFT_FIELDS[self.type]
        for name in sorted(self.model_fields_set - {"type"} - set(own)):
            takers = [kind for kind, fields in _PEFT_FIELDS.items() if name in fields]
            raise problem(
                f"{name!r} has no meaning for type {self.type!r}",
                got=name,
                allowed=", ".join(own) if own else "no other field",
                remedy=removal(
                    f"dsso.peft.{name}", f", or set dsso.peft.type to {' or '.join(map(repr, takers))}"
                ),
            )
        return self

    @model_serializer(mode="wrap")
    def _fields_of_the_type(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # fields of another type would be refused when the written configuration is read again
        own = {"type", *_PEFT_FIELDS[self.type]}
        return {name: value for name, value in handler(self).items() if name in own}


class TaskConfig(StrictModel):
    """What is learnt, from which data, and how an example becomes text."""

    name: str = Field(default="builtin", min_length=1)
    """Name of a task, e.g. mrpc, stsb, rte, boolq; `builtin` generates its own sentence pairs."""
    data_dir: str | None = None
    """Directory with the task's files (or with one directory per task); null: `$DSSO_DATA`, then the hub."""
    head: Literal["auto", "classification", "prompt"] = "auto"
    """`auto`: prompts for text-to-text and causal models, a classification head for encoders."""
    prompt: str | None = None
    """Template with `{column}` placeholders that replaces the task's own."""
    verbalizer: list[str] | None = Field(default=None, min_length=2)
    """One word per class, in the order of the labels, that replaces the task's own."""
    max_length: int = Field(default=128, ge=1)
    """Longest input in tokens; what is longer is cut."""
    max_target_length: int = Field(default=32, ge=1)
    """Longest target in tokens, for text-to-text models."""
    train_examples: int | None = Field(default=None, ge=1)
    """Use only so many training examples (drawn with the seed); null uses all."""
    eval_examples: int | None = Field(default=None, ge=1)
    """Use only so many examples of the validation and of the test set; null uses all."""
    columns: dict[str, str] | None = None
    """Names of columns in the files by the name that the task expects, e.g. `{"sentence1": "premise"}`."""
    protocol: Literal["paper", "official"] = "paper"
    """`paper`: validation and test are made from the public splits; `official`: the splits as published."""


OBJECTIVES = ("loss", "accuracy", "f1", "exact_match", "text_f1")
"""What a method that needs only losses can lower (metrics as 1 - their value), besides a user's own function."""


class TrainConfig(StrictModel):
    """How long to train, and how often to look, write and stop."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; exactly one of `max_steps` and `epochs` is given."""
    epochs: float | None = Field(default=None, gt=0.0)
    """Passes over the training set; exactly one of `max_steps` and `epochs` is given."""
    eval_interval: int = Field(default=200, ge=1)
    """Steps between two evaluations on the validation set."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    """Examples per rank and forward pass of an evaluation; null takes the micro-batch size."""
    log_interval: int = Field(default=10, ge=1)
    """Steps between two lines of `metrics.jsonl`; a logging step synchronizes with the device."""
    save_interval: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints; null takes `eval_interval`."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints that are kept besides the best one."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without improvement; null never stops early."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the data order, of dropout and of random weights."""
    objective: str = "loss"
    """What a step lowers: `loss`, 1 - `accuracy`, `f1`, `exact_match` or `text_f1`, or `module:function`."""
    max_consecutive_skips: int = Field(default=10, ge=1)
    """Stop with an error after so many steps in a row that were skipped for a non-finite loss or gradient."""
    noop_window: int = Field(default=50, ge=1)
    """Warn after so many steps in a row whose update is parallel to the gradient (cosine above 0.9999)."""
    timeout_minutes: float = Field(default=10.0, gt=0.0)
    """Longest wait for another rank before a collective call fails."""
    time_limit_minutes: float | None = Field(default=None, gt=0.0)
    """Leave with a checkpoint before the process has run so long; null: the limit of the Slurm job, if it is one."""
    interface: str | None = Field(default=None, min_length=1)
    """Network interface, e.g. `ib0`, that ranks meet and communicate on; null: the libraries' choice."""
    digest_interval: int | None = Field(default=100, ge=1)
    """Methods from forward passes: steps between two comparisons of the ranks' weights, whose digest goes into the seed
    log; null: never."""
    log_sync_interval: int | None = Field(default=None, ge=1)
    """Methods from forward passes: steps between two waits until the disk has the seed log; null leaves it to the
    operating system, which loses nothing when the run alone is killed."""

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        if name not in OBJECTIVES and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) is None:
            raise problem("unknown objective", allowed=[*OBJECTIVES, "module:function"])
        return name

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise problem(
                "exactly one of max_steps and epochs must be given",
                got=f"max_steps={self.max_steps}, epochs={self.epochs}",
                remedy="set dsso.train.max_steps, or dsso.train.epochs, and not the other",
            )
        return self


class DssoConfig(StrictModel):
    """The `"dsso"` section: everything that is not DeepSpeed's own."""

    comment: str | None = None
    """What the recipe is for."""
    engine: Literal["deepspeed", "fsdp2", "ddp", "single"] = "deepspeed"
    """`deepspeed` (ZeRO 0 to 3), `fsdp2` (all sharded), `ddp` (replicas), or `single`: one device, no launcher."""
    model: ModelConfig = ModelConfig(name="tiny-t5")
    """Which model is trained; not used by `dsso.initialize(model=…)`, which brings its own."""
    peft: PeftConfig = PeftConfig()
    """Which parameters are trained."""
    task: TaskConfig = TaskConfig()
    """What is learnt."""
    train: TrainConfig = TrainConfig(epochs=3.0)
    """How long, how often; three epochs when the section is left out."""
    output_dir: str | None = None
    """Where the run is written; the command line's `--output_dir` takes precedence."""


_Model = TypeVar("_Model", bound=pydantic.BaseModel)


def parse(model: type[_Model], data: object, where: str) -> _Model:
    """Validate `data` against `model`.

    Args:
        model: a `StrictModel`.
        data: what the recipe holds at that place.
        where: path of that place, e.g. `optimizer.params`.

    Raises:
        RecipeError: with the path, the value, what is allowed, and the nearest name for an unknown key; when
            several things are wrong, all of them are told.
    """
    if not isinstance(data, Mapping):
        raise _no_object(where, data)
    try:
        # validated as the JSON that a recipe is: in strict models only there does an array fill a tuple
        text = json.dumps(dict(data))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"cannot be written as JSON ({error})", where=where) from None
    try:
        return model.model_validate_json(text)
    except pydantic.ValidationError as error:
        told = [_told(detail, model, where) for detail in error.errors(include_url=False)]
        raise told[0] if len(told) == 1 else RecipeError("\n".join(str(one) for one in told)) from None


def _no_object(where: str, got: object) -> RecipeError:
    return RecipeError("must be an object", where=where, got=got, remedy='write it as {"key": value, ...}')


def _told(detail: ErrorDetails, model: type[pydantic.BaseModel], where: str) -> RecipeError:
    """One pydantic error in the words of a `RecipeError`."""
    *parents, last = [where, *(str(part) for part in detail["loc"])]
    path = ".".join([*parents, last])
    kind, got, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "dsso":
        got = context.get("got", None if isinstance(got, Mapping) else got)
        allowed, remedy = context.get("allowed"), context.get("remedy")
        return RecipeError(context["what"], where=path, got=got, allowed=allowed, remedy=remedy)
    if kind == "extra_forbidden":
        fields = sorted(_fields_at(model, detail["loc"][:-1]))
        return RecipeError(
            "unknown key", where=path, got=last, allowed=fields, remedy="correct or remove the key"
        )
    if kind == "missing":
        return RecipeError(
            "is required and missing", where=path, remedy=f"add {last!r} to {'.'.join(parents)}"
        )
    if kind == "literal_error":
        options = [option.strip("'") for option in context["expected"].replace(" or ", ", ").split(", ")]
        return RecipeError("is not one of the options", where=path, got=got, allowed=options)
    if kind == "model_type":
        return _no_object(path, got)
    allowed = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return RecipeError("has a wrong type or value", where=path, got=got, allowed=allowed)


def _fields_at(model: type[pydantic.BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Names of the fields of the model that sits at `loc` inside `model`."""
    for part in loc:
        field = model.model_fields.get(str(part))
        # The model itself, or that in `Model | None` or in `dict[str, Model]`, whose keys are no fields.
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next(
            (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)), model
        )
    return set(model.model_fields)
