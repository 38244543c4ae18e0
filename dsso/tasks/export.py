"""Writing what was trained, and reading it back.

LoRA and prefixes are written in peft's own format, for use without this project; bottleneck adapters as
safetensors and json, for `load`; a model that was trained whole as transformers writes it. All of it from a
state dict that was gathered before, because under ZeRO-3 the modules themselves hold nothing that could be
saved.
"""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsso.errors import RecipeError, RunError
from dsso.files import save_file
from dsso.tasks import bottleneck

if TYPE_CHECKING:
    from dsso.tasks.models import ModelBundle

WEIGHTS_FILE, CONFIG_FILE = "dsso_adapter.safetensors", "dsso_adapter.json"
"""Files of a bottleneck adapter."""
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
"""File of peft's format that holds the weights; its configuration is beside it."""
README_FILE = "README.md"
"""File that says how the adapter is read back."""

_ADAPTER = "default"


def export(bundle: ModelBundle, state_dict: Mapping[str, Tensor], directory: str | Path) -> None:
    """Write what was trained; one process calls it.

    Args:
        bundle: the model that was trained.
        state_dict: full trained parameters by name, on the CPU.
        directory: made when it does not exist.

    Raises:
        RunError: a trained parameter is missing from `state_dict`.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    trained = {name for name, parameter in bundle.model.named_parameters() if parameter.requires_grad}
    missing = sorted(trained - set(state_dict))
    if missing:
        raise RunError(
            f"{len(missing)} of {len(trained)} trained parameters were not gathered, nothing was exported",
            where=str(target),
            got=missing[0],
        )
    full = {name: state_dict[name].detach().cpu().contiguous() for name in state_dict}
    kind = bundle.peft.type if bundle.peft is not None else "none"
    if kind == "adapter":
        _write_bottleneck(bundle, {name: full[name] for name in sorted(trained)}, target)
        _write_readme(bundle, target)
    elif kind == "none":
        model: Any = bundle.model
        model.save_pretrained(target, state_dict=dict(full))
        bundle.tokenizer.save_pretrained(target)
        # safetensors makes files that their owner alone can read; the configuration is a file like any other
        for file in target.glob("*.safetensors"):
            file.chmod(stat.S_IMODE((target / "config.json").stat().st_mode))
    else:
        _write_peft(bundle, full, target)
        _write_readme(bundle, target)


def _write_bottleneck(bundle: ModelBundle, tensors: dict[str, Tensor], target: Path) -> None:
    assert bundle.peft is not None
    save_file(tensors, target / WEIGHTS_FILE)
    described = {
        "format": 1,
        "base_model": bundle.name,
        "head": bundle.head,
        "variant": bundle.peft.variant,
        "bottleneck": bundle.peft.bottleneck,
        "activation": bundle.peft.activation,
    }
    (target / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put an exported bottleneck adapter into a base model, in place.

    Args:
        model: the base, as `models.load` makes it.
        directory: what `export` wrote.

    Returns:
        The same model.

    Raises:
        RecipeError: the files are missing, or belong to another model.
    """
    from safetensors.torch import load_file

    source = Path(directory)
    try:
        described = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(source / WEIGHTS_FILE)
    except OSError as error:
        raise RecipeError(
            f"the directory holds no bottleneck adapter ({error})",
            where=str(source),
            allowed=f"{CONFIG_FILE} and {WEIGHTS_FILE}",
            remedy="adapters of the kinds lora and prefix are loaded with peft.PeftModel.from_pretrained",
        ) from error
    bottleneck.insert(model, described["variant"], described["bottleneck"], described["activation"])
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise RecipeError(
                "the adapter belongs to another model",
                where=str(source),
                got=f"{name} {tuple(tensor.shape)}",
                remedy=f"load it into {described['base_model']} with head {described['head']}",
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return model


def _write_peft(bundle: ModelBundle, full: dict[str, Tensor], target: Path) -> None:
    from peft import get_peft_model_state_dict

    model: Any = bundle.model
    config = copy.copy(model.peft_config[_ADAPTER])
    if getattr(config, "modules_to_save", None):
        # peft adds the names of heads to whatever is there, at every wrapping
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    if config.is_prompt_learning:
        tensors = _prefix_tensors(model, config, full)
    else:
        # the embeddings are never trained here, and asking peft to look would ask the hub
        tensors = get_peft_model_state_dict(model, state_dict=full, save_embedding_layers=False)
    config.inference_mode = True
    config.base_model_name_or_path = bundle.name
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / PEFT_WEIGHTS_FILE)
    config.save_pretrained(target)


@torch.no_grad()
def _prefix_tensors(model: Any, config: Any, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prefix as peft stores it: the vectors themselves, whatever network they were learnt through."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    stem = f"prompt_encoder.{_ADAPTER}."
    encoder = type(model.prompt_encoder[_ADAPTER])(config)
    own = {name.removeprefix(stem): tensor for name, tensor in full.items() if name.startswith(stem)}
    encoder.load_state_dict(own)
    encoder.to(next(iter(own.values())).dtype)
    found = {"prompt_embeddings": encoder(torch.arange(config.num_virtual_tokens).unsqueeze(0))[0]}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inner = {
                key.removeprefix(f"{name}."): value
                for key, value in full.items()
                if key.startswith(f"{name}.")
            }
            saved = module.adapter_state_dict(_ADAPTER, inner)
            found.update({f"{name}.{key}": value for key, value in saved.items()})
    return found


def _write_readme(bundle: ModelBundle, target: Path) -> None:
    """Say which lines read the adapter back: peft only warns when a base has other names than the adapter."""
    if bundle.source is None:
        return
    assert bundle.peft is not None
    own = bundle.peft.type == "adapter"
    head = "prompt" if bundle.head == "prompt" else "classification"
    given = bundle.source.model_dump(exclude_defaults=True, exclude={"gradient_checkpointing", "dropout"})
    named = ", ".join(f"{name}={value!r}" for name, value in {"name": bundle.name, **given}.items())
    read = "tasks.adapters.load(base, directory)" if own else "PeftModel.from_pretrained(base, directory)"
    parts = [
        f"# Adapter ({bundle.peft.type}) of `{bundle.name}`, trained on the task `{bundle.task}`\n",
        "Read it back, with the path of this folder as `directory`:\n",
        "```python",
        *([] if own else ["from peft import PeftModel"]),
        "from dsso import tasks",
        "from dsso.config import ModelConfig, TaskConfig\n",
        f"config = TaskConfig(name={bundle.task!r}, head={head!r})",
        f'task = tasks.without_data(config, seed={bundle.seed}, reason="its labels are enough")',
        f"base = tasks.models.load(ModelConfig({named}), task, config).model",
        f"model = {read}",
        "```\n",
    ]
    auto = None if own else _without_dsso(bundle)
    if auto is not None:
        parts += [
            "Or without dsso:\n",
            "```python",
            "import transformers",
            "from peft import PeftModel\n",
            f"base = {auto}",
            f"model = {read}",
            "```\n",
        ]
    (target / README_FILE).write_text("\n".join(parts), encoding="utf-8")


def _without_dsso(bundle: ModelBundle) -> str | None:
    """The call of transformers that makes the same base; None where only this project can make it."""
    from dsso.tasks.models import BUILT_IN, auto_class
    from dsso.tasks.pooling import MeanPoolClassifier

    source = bundle.source
    assert source is not None
    pooled = any(isinstance(module, MeanPoolClassifier) for module in bundle.model.modules())
    if pooled or source.name in BUILT_IN or source.init == "random":
        return None
    options: dict[str, Any] = {"revision": source.revision} if source.revision is not None else {}
    if source.trust_remote_code:
        options["trust_remote_code"] = True
    if bundle.head != "prompt":
        options |= {"num_labels": bundle.config.num_labels, "pad_token_id": bundle.config.pad_token_id}
    words = ", ".join([repr(source.name), *(f"{name}={value!r}" for name, value in options.items())])
    return f"transformers.{auto_class(bundle.family, bundle.head).__name__}.from_pretrained({words})"
