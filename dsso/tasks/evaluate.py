"""Predictions of a split, shared by the ranks, and their metrics.

Every rank makes the same number of forward passes, because a sharded engine waits for all ranks in each of
them; the predictions of all ranks are put together before any metric is computed, so uneven shares change
nothing.

Dimensions: B examples, N loss terms, C classes or vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsso.tasks.data import Batch, Encoded, pad
from dsso.tasks.metrics import Prediction, compute

if TYPE_CHECKING:
    from dsso.tasks.prepared import PreparedTask


@dataclass(frozen=True)
class Record:
    """What a model said about one example."""

    index: int
    prediction: Prediction
    loss: float
    """Sum over the example's loss terms."""
    terms: int


def share(n: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The batches of one rank; the same number on every rank, the last ones possibly empty.

    Args:
        n: examples of the split.
        batch_size: most examples in a batch.
        rank: this rank.
        world_size: number of ranks.
    """
    mine = range(rank, n, world_size)
    largest = -(-n // world_size)
    return [list(mine[start : start + batch_size]) for start in range(0, largest, batch_size)]


def per_term_losses(kind: str, logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Losses `[N]` in fp32.

    Args:
        kind: `cross_entropy` or `mse`.
        logits_NC: class scores, or values `[N, 1]`.
        labels_N: classes, or values.
    """
    if kind == "mse":
        return (logits_NC.float().squeeze(-1) - labels_N.float()).square()
    return functional.cross_entropy(logits_NC.float(), labels_N, reduction="none")


def segment_sum(values_N: Tensor, counts: Sequence[int]) -> Tensor:
    """Sums `[B]` of neighbouring values, `counts[b]` for example b."""
    owners = torch.repeat_interleave(
        torch.arange(len(counts)), torch.tensor(list(counts)), output_size=sum(counts)
    )
    sums = torch.zeros(len(counts), dtype=values_N.dtype, device=values_N.device)
    return sums.index_add_(0, owners.to(values_N.device), values_N)


def module_of(engine: Any) -> nn.Module:
    """The model behind an engine, or the model itself."""
    inner = getattr(engine, "module", None)
    return inner if isinstance(inner, nn.Module) else engine


@torch.no_grad()
def records(
    ready: PreparedTask,
    engine: Callable[..., Any],
    split: str,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
) -> list[Record]:
    """What the model says about this rank's share of a split; puts the model's mode back.

    Args:
        ready: the prepared task.
        engine: an engine, or the plain model.
        split: `train`, `validation` or `test`.
        batch_size: examples per rank and forward pass.
        rank: this rank.
        world_size: number of ranks.
        device: where the batches go.
    """
    examples = ready.split(split)
    module = module_of(engine)
    training = module.training
    module.eval()
    found: list[Record] = []
    try:
        for indices in share(len(examples), batch_size, rank, world_size):
            # a rank without an example left makes the pass all the same, and drops what comes out
            shown = indices or [0]
            encoded = [examples[index] for index in shown]
            batch = ready.collate(encoded, shown).to(device)
            made = _records(ready, engine, encoded, batch, shown, world_size, device)
            found.extend(made if indices else [])
    finally:
        module.train(training)
    return found


def _records(
    ready: PreparedTask,
    engine: Callable[..., Any],
    encoded: Sequence[Encoded],
    batch: Batch,
    indices: Sequence[int],
    world_size: int,
    device: torch.device | str,
) -> list[Record]:
    logits_NC, labels_N = ready.logits(engine(**batch.inputs), batch)
    counts = [ready.coder.terms(one) for one in encoded]
    losses = segment_sum(per_term_losses(ready.loss_kind, logits_NC, labels_N), counts).tolist()
    predictions: list[Prediction]
    if ready.loss_kind == "mse":
        predictions = logits_NC.float().squeeze(-1).tolist()
    elif ready.bundle.head != "prompt" or ready.coder.class_ids:
        scores_BC = class_scores(ready, engine, encoded, indices, device, logits_NC)
        predictions = scores_BC.argmax(dim=-1).tolist()
    else:
        predictions = written(ready, engine, encoded, world_size, device)
    rows = zip(indices, predictions, losses, counts, strict=True)
    return [Record(index, prediction, loss, terms) for index, prediction, loss, terms in rows]


def class_scores(
    ready: PreparedTask,
    engine: Callable[..., Any],
    encoded: Sequence[Encoded],
    indices: Sequence[int],
    device: torch.device | str,
    logits_NC: Tensor | None = None,
) -> Tensor:
    """Scores `[B, classes]`, the largest of which is the prediction: a head's logits, or log-likelihoods of words.

    Args:
        ready: a prepared task with classes.
        engine: an engine, or the plain model.
        encoded: the examples.
        indices: their indices in the split.
        device: where the batches go.
        logits_NC: `ready.logits` of the examples' own batch, where that pass was made already; else it is made where
            it is needed. Words of more than one token take a pass a class.
    """
    class_ids = ready.coder.class_ids if ready.bundle.head == "prompt" else []
    if all(len(ids) == 1 for ids in class_ids):
        if logits_NC is None:
            batch = ready.collate(encoded, indices).to(device)
            logits_NC, _ = ready.logits(engine(**batch.inputs), batch)
        if not class_ids:
            return logits_NC
        # the first predicted token does not depend on the target: the pass already made is enough
        counts = [ready.coder.terms(one) for one in encoded]
        starts = torch.tensor([0, *counts[:-1]]).cumsum(0).to(logits_NC.device)
        first = logits_NC.index_select(0, starts).float().log_softmax(dim=-1)
        return first[:, [ids[0] for ids in class_ids]]
    scores = []
    for label, ids in enumerate(class_ids):
        candidates = [ready.coder.candidate(one, label) for one in encoded]
        batch = ready.collate(candidates, indices).to(device)
        logits, labels = ready.logits(engine(**batch.inputs), batch)
        losses = per_term_losses("cross_entropy", logits, labels)
        scores.append(-segment_sum(losses, [len(ids)] * len(encoded)))
    return torch.stack(scores, dim=1)


def written(
    ready: PreparedTask,
    engine: Callable[..., Any],
    encoded: Sequence[Encoded],
    world_size: int,
    device: torch.device | str,
    watch: Callable[[Tensor], None] | None = None,
) -> list[Prediction]:
    """Greedy continuations: texts, or the values that they spell.

    Args:
        ready: a prepared task.
        engine: an engine, or the plain model.
        encoded: the examples.
        world_size: number of ranks; they go on until the last one has its texts, because a sharded engine waits.
        device: where the batches go.
        watch: is shown the scores `[B, vocabulary]` of every token.
    """
    tokenizer, causal = ready.bundle.tokenizer, ready.bundle.family == "causal"
    prompts = [one["prompt_ids"] if causal else one["input_ids"] for one in encoded]
    # a continuation starts right behind the prompt, so a causal model is padded on the left; `generate`
    # derives the positions from the mask
    input_ids = pad(prompts, tokenizer.pad_token_id, left=causal).to(device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, left=causal).to(device)
    module: Any = module_of(engine)
    made = module.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=ready.max_target_length,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        synced_gpus=world_size > 1,
        logits_processor=None if watch is None else _watching(watch),
    )
    texts = tokenizer.batch_decode(
        made[:, input_ids.shape[1] :] if causal else made, skip_special_tokens=True
    )
    if ready.task.spec.kind == "regression":
        return [parse_value(text, ready.task.spec.value_range) for text in texts]
    return [text.strip() for text in texts]


def _watching(watch: Callable[[Tensor], None]) -> Any:
    """What `generate` passes its scores through, unchanged."""
    # Not before it is asked for: the import takes seconds.
    from transformers import LogitsProcessorList

    def shown(_: Tensor, scores: Tensor) -> Tensor:
        watch(scores)
        return scores

    return LogitsProcessorList([shown])


def parse_value(text: str, bounds: tuple[float, float]) -> float:
    """The first number in a text, kept within bounds; the middle of the bounds where there is none."""
    number = re.search(r"-?\d+(\.\d+)?", text)
    low, high = bounds
    return min(max(float(number.group()), low), high) if number else (low + high) / 2


def score(ready: PreparedTask, split: str, found: Sequence[Record]) -> dict[str, float]:
    """Metrics and `loss` (per loss term) of a split from the records of all ranks.

    Args:
        ready: the prepared task.
        split: name of the split.
        found: records in any order.

    Raises:
        ValueError: an example is missing or was counted twice.
    """
    examples = ready.task.split(split)
    ordered = sorted(found, key=lambda record: record.index)
    if [record.index for record in ordered] != list(range(len(examples))):
        raise ValueError(
            f"{len(found)} predictions do not cover the {len(examples)} examples of {split} once each"
        )
    metrics = compute(ready.task.spec, [record.prediction for record in ordered], examples)
    terms = sum(record.terms for record in ordered)
    return {**metrics, "loss": sum(record.loss for record in ordered) / terms}
