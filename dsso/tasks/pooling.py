"""Classification over the mean of the token vectors.

Sentence encoders such as MiniLM are trained with mean pooling (Reimers and Gurevych 2019, arXiv:1908.10084);
the pooler that their architecture also has was never trained, so the usual sequence classification would
start from noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


def is_mean_pooled(path: str) -> bool:
    """True for the directory of a sentence encoder that was trained with mean pooling."""
    file = Path(path) / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens", False))


class MeanPoolClassifier(PreTrainedModel):  # type: ignore[misc]
    """An encoder, the mean of its outputs over the real tokens, dropout and a linear layer.

    Args:
        config: configuration of the encoder, with `num_labels`.
        encoder: the encoder; made from the configuration when left out.
    """

    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Any, encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        self.encoder: Any = encoder if encoder is not None else AutoModel.from_config(config)
        if getattr(self.encoder, "pooler", None) is not None:
            # it would be a parameter without a gradient
            self.encoder.pooler = None
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.0))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's word embeddings."""
        embeddings: nn.Module = self.encoder.get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Class scores `[B, C]` for `input_ids` and `attention_mask`, both `[B, T]`."""
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        kwargs.pop("labels", None)
        kwargs["return_dict"] = True
        hidden_BTI = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **kwargs
        ).last_hidden_state
        if attention_mask is None:
            pooled_BI = hidden_BTI.mean(dim=1)
        else:
            # a learnt prefix widens the mask, but has no output of its own
            weight_BT1 = attention_mask[:, -hidden_BTI.shape[1] :].unsqueeze(-1).to(hidden_BTI.dtype)
            pooled_BI = (hidden_BTI * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp_min(1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled_BI)))
