"""Built-in tiny models with random weights, one per family, and their byte tokenizer: nothing to download.

Two layers, 64 wide, four heads. The tokenizer is the byte-level one of ByT5 (Xue et al. 2021,
arXiv:2105.13626), which needs no files, with a mask token added.
"""

from __future__ import annotations

from typing import Any

WIDTH, INNER, LAYERS, HEADS = 64, 128, 2, 4
POSITIONS = 1024

NAMES = ("tiny-t5", "tiny-roberta", "tiny-bert", "tiny-opt", "tiny-llama")
"""Names in the recipe."""


def tokenizer() -> Any:
    """Byte-level tokenizer: pad 0, end of sequence 1, unknown 2, bytes from 3, then a mask token."""
    from transformers import ByT5Tokenizer

    made = ByT5Tokenizer(extra_ids=0)
    made.add_special_tokens({"mask_token": "<mask>"})
    return made


def config(name: str, vocabulary: int) -> Any:
    """Architecture of a built-in model.

    Args:
        name: one of `NAMES`.
        vocabulary: number of tokens.
    """
    import transformers

    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    encoder = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    if name == "tiny-t5":
        return transformers.T5Config(
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=INNER,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            **{key: value for key, value in ids.items() if key != "bos_token_id"},
        )
    if name == "tiny-roberta":
        # RoBERTa counts positions from pad_token_id + 1
        return transformers.RobertaConfig(
            max_position_embeddings=POSITIONS + 1, type_vocab_size=1, **encoder, **ids
        )
    if name == "tiny-bert":
        return transformers.BertConfig(max_position_embeddings=POSITIONS, **encoder, **ids)
    if name == "tiny-opt":
        return transformers.OPTConfig(
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
            **ids,
        )
    if name == "tiny-llama":
        return transformers.LlamaConfig(
            num_key_value_heads=HEADS // 2, max_position_embeddings=POSITIONS, **encoder, **ids
        )
    raise KeyError(name)
