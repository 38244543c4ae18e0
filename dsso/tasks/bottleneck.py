"""Bottleneck adapters: a narrow two-layer network behind a sublayer, with a skip connection.

    adapter(h) = h + W_up f(W_down h + b_down) + b_up

`houlsby` (Houlsby et al. 2019, arXiv:1902.00751, fig. 2) puts one behind every attention and every
feed-forward projection, before the sublayer's own residual; `pfeiffer` (Pfeiffer et al. 2021,
arXiv:2005.00247) one behind the feed-forward projection only. Both are found by the structure of the model,
not by its name. Two differences from the papers: the base's norms stay frozen, and Pfeiffer's adapter sits
before the sublayer's residual as Houlsby's does.

The start is nearly the identity: `W_down` is drawn with standard deviation 1e-2, `W_up` with 1e-3. It is not
zero, because with `W_up` = 0 the gradient of `W_down` vanishes, and with it the curvature that a first step
would measure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from dsso.errors import RecipeError

DOWN_STD, UP_STD = 1e-2, 1e-3

# where adapters belong, by architecture: behind the attention projections, behind the feed-forward ones
_SITES: dict[str, tuple[str, str]] = {
    "T5": (r"\.(SelfAttention|EncDecAttention)\.o$", r"\.DenseReluDense$"),
    "BERT, RoBERTa": (r"\.attention\.output\.dense$", r"\.layer\.\d+\.output\.dense$"),
    "OPT": (r"\.self_attn\.out_proj$", r"\.layers\.\d+\.fc2$"),
    "Llama": (r"\.self_attn\.o_proj$", r"\.mlp\.down_proj$"),
}

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class BottleneckAdapter(nn.Module):
    """A narrow two-layer network with a skip connection.

    Args:
        width: size of the vectors.
        bottleneck: size of the narrow layer.
        activation: name of the non-linearity.
        like: its type and device are taken over.
    """

    def __init__(self, width: int, bottleneck: int, activation: str, like: torch.Tensor) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(width, bottleneck, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(bottleneck, width, dtype=like.dtype, device=like.device)
        nn.init.trunc_normal_(self.down.weight, std=DOWN_STD, a=-2 * DOWN_STD, b=2 * DOWN_STD)
        nn.init.trunc_normal_(self.up.weight, std=UP_STD, a=-2 * UP_STD, b=2 * UP_STD)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vectors `[..., width]` to vectors of the same shape."""
        change: torch.Tensor = self.up(_ACTIVATIONS[self.activation](self.down(hidden)))
        return hidden + change


class AdaptedLayer(nn.Module):
    """A frozen layer and the adapter behind it, both called through their own forward.

    Args:
        layer: the layer that was there.
        adapter: what its output goes through.
    """

    def __init__(self, layer: nn.Module, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output, adapted."""
        adapted: torch.Tensor = self.adapter(self.layer(*args, **kwargs))
        return adapted


def sites(model: nn.Module, variant: Literal["houlsby", "pfeiffer"]) -> list[str]:
    """Names of the modules that an adapter goes behind.

    Raises:
        RecipeError: the model has no such place.
    """
    names = [name for name, _ in model.named_modules()]
    for attention, feed_forward in _SITES.values():
        patterns = (attention, feed_forward) if variant == "houlsby" else (feed_forward,)
        behind_attention = [name for name in names if re.search(attention, f".{name}")]
        found = [name for name in names if any(re.search(pattern, f".{name}") for pattern in patterns)]
        # the attention projections decide which architecture this is
        if behind_attention and found:
            return found
    raise RecipeError(
        "the model has no place for bottleneck adapters",
        where="dsso.peft.type",
        got=type(model).__name__,
        allowed=f"models built like {'; '.join(_SITES)}",
        remedy='use "lora" with dsso.peft.targets',
    )


def insert(
    model: nn.Module, variant: Literal["houlsby", "pfeiffer"], bottleneck: int, activation: str
) -> list[str]:
    """Put adapters into a model, in place.

    Args:
        model: the model.
        variant: where they go.
        bottleneck: size of the narrow layer.
        activation: name of the non-linearity.

    Returns:
        Names of the adapters.

    Raises:
        RecipeError: the model has no place for them, or the bottleneck is not narrow.
    """
    names = sites(model, variant)
    for name in names:
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        layer = parent.get_submodule(child_name)
        last = _last_projection(layer)
        # not weight.shape, which is empty where an engine has partitioned the weight already
        width = last.out_features
        if bottleneck > width:
            raise RecipeError(
                f"the bottleneck is wider than the vectors of {name!r} ({width})",
                where="dsso.peft.bottleneck",
                got=bottleneck,
                allowed=f"1 to {width}",
            )
        adapter = BottleneckAdapter(width, bottleneck, activation, last.weight)
        setattr(parent, child_name, AdaptedLayer(layer, adapter))
    return [f"{name}.adapter" for name in names]


def _last_projection(layer: nn.Module) -> nn.Linear:
    """The projection that makes the output of a site: the site itself, or the last one inside."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)][-1]
