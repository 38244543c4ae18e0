"""A task made ready for a model: tokenized splits, batches, losses and evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from dsso.config import TaskConfig
from dsso.curvature.labels import sample_labels
from dsso.engines.estimates import MicroBatch
from dsso.errors import RecipeError
from dsso.tasks import evaluate as evaluation
from dsso.tasks.base import Example, Task
from dsso.tasks.data import Batch, Encoded
from dsso.tasks.encode import CausalCoder, ClassificationCoder, Coder, MaskedCoder, Seq2SeqCoder
from dsso.tasks.metrics import Prediction, compute, require_torchmetrics
from dsso.tasks.models import ModelBundle
from dsso.tasks.prompts import choose_verbalizer, parse_template


class TokenizedSplit(Sequence[Encoded]):
    """Examples of a split, tokenized when they are first asked for and then kept.

    Args:
        examples: the examples.
        encode: tokenizes one.
    """

    def __init__(self, examples: Sequence[Example], encode: Callable[[Example], Encoded]) -> None:
        self._examples, self._encode = examples, encode
        self._kept: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if position not in self._kept:
            self._kept[position] = self._encode(self._examples[position])
        return self._kept[position]


class PreparedTask:
    """A task, a model's tokens for it, and how the model is judged.

    Args:
        task: the task.
        bundle: the model.
        coder: turns examples into tokens.
        max_target_length: most tokens that are written.
    """

    def __init__(self, task: Task, bundle: ModelBundle, coder: Coder, max_target_length: int) -> None:
        self.task, self.bundle, self.coder, self.max_target_length = task, bundle, coder, max_target_length
        self.train = TokenizedSplit(task.train, coder.encode)
        self.validation = TokenizedSplit(task.validation, coder.encode)
        self.test = TokenizedSplit(task.test, coder.encode)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the task's metrics."""
        return self.task.spec.metrics

    @property
    def main_metric(self) -> str:
        """Name of the metric that decides which checkpoint is best; larger is better."""
        return self.task.spec.main_metric

    @property
    def loss_kind(self) -> Literal["cross_entropy", "mse"]:
        """Loss of one term."""
        return "mse" if self.bundle.head == "regression" else "cross_entropy"

    def split(self, name: str) -> TokenizedSplit:
        """Tokenized examples of `train`, `validation` or `test`."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return splits[name]

    def terms(self, index: int) -> int:
        """Number of loss terms of a training example: 1 with a head, target tokens with a prompt."""
        return self.coder.terms(self.train[index])

    def collate(self, examples: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        """Tokenized examples as one batch.

        Args:
            examples: elements of a tokenized split.
            indices: their indices, kept as `example_ids`.
        """
        return self.coder.collate(examples, indices)

    def logits(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """What carries a loss term.

        Args:
            outputs: what the model returned.
            batch: its batch, on the same device.

        Returns:
            Scores `[N, C]` and labels `[N]`; N is `batch.terms`.
        """
        logits: Tensor = outputs.logits
        if batch.positions is None:
            return logits, batch.labels
        return (
            logits.flatten(0, 1).index_select(0, batch.positions),
            batch.labels.flatten().index_select(0, batch.positions),
        )

    def loss_sum(self, outputs: Any, batch: Batch) -> Tensor:
        """Sum of the losses of a batch, a scalar in fp32; divide by the terms of the whole global batch."""
        return evaluation.per_term_losses(self.loss_kind, *self.logits(outputs, batch)).sum()

    def sampled_loss_sum(self, outputs: Any, batch: Batch, seed: int, step: int) -> Tensor:
        """Sum of the losses of a batch at labels drawn from the model, a scalar in fp32.

        Args:
            outputs: of the model.
            batch: that it was given.
            seed: of the run.
            step: of the run; with the examples' numbers and positions it decides the draw.
        """
        logits, _ = self.logits(outputs, batch)
        return self._sampled(logits, batch, seed, step)

    def _sampled(self, logits: Tensor, batch: Batch, seed: int, step: int) -> Tensor:
        if batch.positions is None:
            examples, places = batch.example_ids, torch.zeros_like(batch.example_ids)
        else:
            width = batch.labels.shape[1]
            examples = batch.example_ids.index_select(0, batch.positions // width)
            places = batch.positions % width
        drawn = sample_labels(logits, self.loss_kind, seed, step, examples, places)
        return evaluation.per_term_losses(self.loss_kind, logits, drawn).sum()

    def micro_batch(
        self, engine: Callable[..., Any], batch: Batch, terms: float, seed: int, step: int
    ) -> MicroBatch:
        """A micro-batch for windows of estimation.

        Args:
            engine: runs the model.
            batch: on its device.
            terms: what sums of losses are divided by.
            seed: of the run.
            step: of the run; labels are drawn by both.
        """
        if batch.positions is None:
            labels = batch.labels
        else:
            labels = batch.labels.flatten().index_select(0, batch.positions)

        def loss(scores: Tensor) -> Tensor:
            return evaluation.per_term_losses(self.loss_kind, scores, labels).sum() / terms

        return MicroBatch(
            terms,
            lambda: self.logits(engine(**batch.inputs), batch)[0],
            loss,
            lambda scores: self._sampled(scores, batch, seed, step) / terms,
        )

    def evaluate(
        self,
        engine: Callable[..., Any],
        split: str,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Metrics and `loss` of a split, the same on every rank; every rank calls it.

        Args:
            engine: an engine, or the plain model.
            split: `train`, `validation` or `test`.
            batch_size: examples per rank and forward pass.
            rank: this rank.
            world_size: number of ranks.
            device: where the batches go.
        """
        found = evaluation.records(self, engine, split, batch_size, rank, world_size, device)
        if world_size > 1:
            from dsso.parallel.collectives import gather_objects

            found = [record for part in gather_objects(found) for record in part]
        return evaluation.score(self, split, found)

    @property
    def majority_baseline(self) -> dict[str, float]:
        """`baseline` of the validation set."""
        return self.baseline("validation")

    def baseline(self, split: str) -> dict[str, float]:
        """Metrics of always giving the commonest training answer (of values: their mean)."""
        train = self.task.train
        answer: Prediction
        if self.task.spec.kind == "regression":
            answer = sum(float(example.label or 0.0) for example in train) / len(train)
        elif self.task.spec.kind == "text":
            answer = Counter(example.answers[0] for example in train).most_common(1)[0][0]
        else:
            answer = Counter(int(example.label or 0) for example in train).most_common(1)[0][0]
        examples = self.task.split(split)
        return compute(self.task.spec, [answer] * len(examples), examples)


def prepare(task: Task, bundle: ModelBundle, config: TaskConfig) -> PreparedTask:
    """Make a task ready for a model.

    Args:
        task: the task.
        bundle: the model, with or without adapters.
        config: the recipe's `dsso.task`.

    Raises:
        RecipeError: the prompt or the verbalizer cannot be used, a length is beyond what the model can read,
            or torchmetrics is missing.
    """
    require_torchmetrics()
    _check_length(bundle, config)
    spec, tokenizer = task.spec, bundle.tokenizer
    if bundle.head != "prompt":
        joined = bundle.family == "causal"
        coder: Coder = ClassificationCoder(spec, tokenizer, config.max_length, joined)
        return PreparedTask(task, bundle, coder, config.max_target_length)
    masked = bundle.family == "encoder"
    template = parse_template(config.prompt if config.prompt is not None else spec.template, task, masked)
    words = choose_verbalizer(task, config.verbalizer)
    if masked:
        coder = MaskedCoder(spec, tokenizer, template.with_mask(), words, config.max_length)
    elif bundle.family == "seq2seq":
        start = bundle.config.decoder_start_token_id
        lengths = (config.max_length, config.max_target_length)
        coder = Seq2SeqCoder(spec, tokenizer, template, words, *lengths, start)
    else:
        coder = CausalCoder(spec, tokenizer, template, words, config.max_length, config.max_target_length)
    ready = PreparedTask(task, bundle, coder, config.max_target_length)
    # a prompt that can never fit is told now, not in the middle of a run
    _ = ready.train[0]
    return ready


def _check_length(bundle: ModelBundle, config: TaskConfig) -> None:
    positions = getattr(bundle.config, "max_position_embeddings", None)
    if bundle.family == "seq2seq" or positions is None:
        return
    if bundle.config.model_type in {"roberta", "xlm-roberta", "camembert"}:
        # their first position is pad_token_id + 1
        positions -= bundle.config.pad_token_id + 1
    peft = bundle.peft
    prefix = peft.num_virtual_tokens if peft is not None and peft.type == "prefix" else 0
    writes = bundle.family == "causal" and bundle.head == "prompt"
    needed = config.max_length + prefix + (config.max_target_length if writes else 0)
    if needed > positions:
        raise RecipeError(
            f"the model reads at most {positions} tokens, {needed} are asked for",
            where="dsso.task.max_length",
            got=config.max_length,
            allowed=f"at most {positions - (needed - config.max_length)}",
        )
