"""Parameter-efficient fine-tuning: LoRA and prefix tuning through peft, bottleneck adapters of our own.

`apply` freezes the base and adds what is trained; `export` and `load` (see `export.py`) write and read it.
"""

from __future__ import annotations

from torch import nn

from dsso.config import PeftConfig, removal
from dsso.errors import RecipeError, nearest
from dsso.tasks import bottleneck
from dsso.tasks.export import export, load
from dsso.tasks.models import ModelBundle, seeded

__all__ = ["ALL_LINEAR", "apply", "export", "linear_layers", "load", "resolve_targets"]

ALL_LINEAR = "all-linear"
"""Target that stands for every linear layer outside the heads."""

_HEADS = ("classifier", "score", "classification_head", "lm_head", "cls", "embed_out")
_ATTENTION = (
    "q",
    "k",
    "v",
    "o",
    "query",
    "key",
    "value",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "c_attn",
)
"""Last names of attention projections (BERT's output projection, `dense`, has no name of its own)."""


def apply(bundle: ModelBundle, config: PeftConfig) -> ModelBundle:
    """Freeze the model and add what is trained, in place; `none` leaves every parameter trainable.

    A new classification head is trained besides.

    Args:
        bundle: model and tokenizer.
        config: the recipe's `dsso.peft`.

    Returns:
        The same bundle.

    Raises:
        RecipeError: targets or modules match nothing, a rank is too large, or the model cannot take this
            kind.
    """
    if bundle.peft is not None and bundle.peft.type != "none":
        raise RecipeError("the model has adapters already", where="dsso.peft.type", got=config.type)
    bundle.peft = config
    if config.type == "none":
        return bundle
    saved = _modules_to_save(bundle, config)
    with seeded(bundle.seed + 1):
        if config.type == "adapter":
            bundle.model.requires_grad_(False)
            bottleneck.insert(bundle.model, config.variant, config.bottleneck, config.activation)
            for name, module in bundle.model.named_modules():
                if isinstance(module, bottleneck.BottleneckAdapter) or _ends(name, saved):
                    module.requires_grad_(True)
        elif config.type == "lora":
            bundle.model = _lora(bundle, config, saved)
        else:
            bundle.model = _prefix(bundle, config)
    return bundle


def _ends(name: str, ends: list[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _modules_to_save(bundle: ModelBundle, config: PeftConfig) -> list[str]:
    """Names of the modules that are trained as a whole: the new head, and those of the recipe."""
    top = {name for name, _ in bundle.model.named_children()}
    found = [name for name in ("classifier", "score", "classification_head") if name in top]
    saved = found if bundle.head != "prompt" else []
    names = [name for name, _ in bundle.model.named_modules() if name]
    for end in config.modules_to_save or []:
        if not any(_ends(name, [end]) for name in names):
            raise RecipeError(
                "a module to save matches nothing in the model",
                where="dsso.peft.modules_to_save",
                got=end,
                allowed=sorted({name.rpartition(".")[2] for name in names} - set("0123456789")),
            )
    return list(dict.fromkeys([*saved, *(config.modules_to_save or [])]))


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Names and sizes (inputs, outputs) of the linear layers outside the heads, HF `Conv1D` included."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if name.partition(".")[0] in _HEADS:
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def resolve_targets(model: nn.Module, targets: list[str] | None) -> list[str]:
    """Full names of the layers that LoRA goes to.

    Args:
        model: the model.
        targets: ends of names, or `["all-linear"]`; None takes the attention projections.

    Raises:
        RecipeError: a target matches no linear layer (the heads do not count).
    """
    layers = linear_layers(model)
    if targets is None:
        found = [
            name
            for name in layers
            if name.rpartition(".")[2] in _ATTENTION or name.endswith("attention.output.dense")
        ]
        if not found:
            raise RecipeError(
                "the model has no layer that is known as an attention projection",
                where="dsso.peft.targets",
                allowed=[ALL_LINEAR, *sorted({name.rpartition(".")[2] for name in layers})],
                remedy="name the targets",
            )
        return found
    if ALL_LINEAR in targets:
        return list(layers)
    lasts = sorted({name.rpartition(".")[2] for name in layers})
    for target in targets:
        if not any(_ends(name, [target]) for name in layers):
            hint = nearest(target, lasts)
            raise RecipeError(
                "a LoRA target matches no linear layer of the model",
                where="dsso.peft.targets",
                got=target,
                allowed=[ALL_LINEAR, *lasts],
                remedy=f"did you mean {hint!r}?" if hint else "use the end of a layer's name",
            )
    return [name for name in layers if _ends(name, targets)]


def _shortest(names: list[str], model: nn.Module) -> list[str]:
    """Ends of names that say the same as the full names, so that the exported file stays legible."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    everything = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    return ends if {name for name in everything if _ends(name, ends)} == set(names) else names


def _task_type(bundle: ModelBundle) -> str | None:
    if bundle.head != "prompt":
        return "SEQ_CLS"
    # peft has no kind for masked LMs; the plain wrapper serves them
    return {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM", "encoder": None}[bundle.family]


def _lora(bundle: ModelBundle, config: PeftConfig, saved: list[str]) -> nn.Module:
    import peft

    names = resolve_targets(bundle.model, config.targets)
    layers = linear_layers(bundle.model)
    narrowest = min(names, key=lambda name: min(layers[name]))
    inputs, outputs = layers[narrowest]
    if config.r > min(inputs, outputs):
        raise RecipeError(
            f"the rank is larger than the smaller side of {narrowest!r} ({inputs} x {outputs})",
            where="dsso.peft.r",
            got=config.r,
            allowed=f"1 to {min(inputs, outputs)}",
        )
    made = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_shortest(names, bundle.model),
        modules_to_save=saved or None,
        task_type=_task_type(bundle),
    )
    wrapped: nn.Module = peft.get_peft_model(bundle.model, made)
    return wrapped


def _prefix(bundle: ModelBundle, config: PeftConfig) -> nn.Module:
    import peft

    if getattr(bundle.model, "is_gradient_checkpointing", False):
        raise RecipeError(
            "prefix tuning needs the attention cache, which gradient checkpointing does without",
            where="dsso.model.gradient_checkpointing",
            got="on, with dsso.peft.type 'prefix'",
            allowed="none",
        )
    if bundle.family == "encoder" and bundle.head == "prompt":
        raise RecipeError(
            "prefix tuning of a masked LM is not available",
            where="dsso.peft.type",
            got="prefix with head 'prompt'",
            allowed="lora, adapter, none",
        )
    if bundle.family == "seq2seq" and bundle.head != "prompt":
        raise RecipeError(
            "prefix tuning of a text-to-text model with a classification head is not available",
            where="dsso.peft.type",
            got=f"prefix with head '{bundle.head}'",
            allowed="lora, adapter, none",
        )
    if config.modules_to_save:
        raise RecipeError(
            "prefix tuning trains the prefix and a new head only",
            where="dsso.peft.modules_to_save",
            got=config.modules_to_save,
            remedy=removal("dsso.peft.modules_to_save", ", or use lora or adapter"),
        )
    made = peft.PrefixTuningConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.prefix_projection,
        encoder_hidden_size=bundle.config.hidden_size,
        task_type=_task_type(bundle),
    )
    wrapped: nn.Module = peft.get_peft_model(bundle.model, made)
    return wrapped
