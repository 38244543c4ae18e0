"""`dsso.initialize` as the guide shows it, with a loop of one's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import dsso
from dsso.engines import quiet
from dsso.errors import RecipeError

RECIPE: dict[str, Any] = {
    "train_batch_size": 8,
    "optimizer": {"type": "KFAC", "params": {"lr": 0.1}},
    "dsso": {"train": {"max_steps": 4}},
}


def _model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def _examples(count: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def test_a_loop_of_ones_own_with_a_loader() -> None:
    model = _model()
    engine, optimizer, loader, scheduler = dsso.initialize(model, RECIPE, training_data=_examples())
    assert scheduler is None
    assert loader is not None
    assert len(loader) == 4
    engine.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for batch in loader:
        # The number of terms is counted from the labels that the model is given.
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
    assert engine.global_steps == optimizer.steps == 4
    health = engine.health()
    assert health["cos_update_grad"] < 0.999
    assert health["layers_without_factors"] == 0
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    engine.close()


def test_counted_terms_equal_given_terms() -> None:
    results = []
    batch = torch.utils.data.default_collate(_examples(8))
    for terms in (None, 8):
        model = _model().eval()
        engine, _, _, _ = dsso.initialize(model, RECIPE)
        engine.train()
        torch.manual_seed(1)
        engine.backward(engine(**batch).loss, terms=terms)
        engine.step()
        results.append(engine.gathered_state_dict())
        engine.close()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])


def test_baselines_and_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(
        '{"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, "gradient_clipping": 0.1}'
    )
    model = _model()
    engine, optimizer, _, _ = dsso.initialize(model, path)
    engine.train()
    engine.backward(engine(**torch.utils.data.default_collate(_examples(8))).loss)
    engine.step()
    health = engine.health()
    assert health["clip_scale"] == pytest.approx(min(1.0, 0.1 / health["grad_norm"]), rel=1e-4)
    assert optimizer.method is None


def test_what_is_not_used_of_a_recipe_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"peft": {"type": "lora"}, "model": {"name": "minilm"}, "train": {"max_steps": 4}}
    for section, told in ((own, "dsso.model, dsso.peft of the recipe"), (RECIPE["dsso"], None)):
        engine, _, _, _ = dsso.initialize(_model(), RECIPE | {"dsso": section})
        engine.close()
        err = capsys.readouterr().err
        assert err.count("not used by dsso.initialize") == (1 if told else 0)
        assert told is None or told in err


def test_an_objective_is_the_loops_own(capsys: pytest.CaptureFixture[str]) -> None:
    for objective in ("accuracy", "loss"):
        section = {"engine": "single", "train": {"max_steps": 1, "objective": objective}}
        recipe = {"train_batch_size": 8, "optimizer": {"type": "MeZO"}, "dsso": section}
        dsso.initialize(_model(), recipe)[0].close()
        told = "note: dsso.train.objective is not used by dsso.initialize" in capsys.readouterr().err
        assert told == (objective != "loss")


def test_three_remarks_of_deepspeed_are_dropped_and_no_others() -> None:
    kept: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("DeepSpeed")
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
        for _ in range(2):
            dsso.initialize(_model(), RECIPE | {"scheduler": scheduler})[0].close()
        for part in (*quiet.IRRELEVANT, "the scale of the loss is 1"):
            logger.warning(f"**** {part} ****")
    finally:
        logger.removeHandler(handler)
    assert kept == ["**** the scale of the loss is 1 ****"]


def test_a_bad_recipe_names_the_place() -> None:
    with pytest.raises(RecipeError, match=r"optimizer.params.dampin\b") as caught:
        dsso.initialize(_model(), RECIPE | {"optimizer": {"type": "KFAC", "params": {"dampin": 1.0}}})
    assert "damping" in str(caught.value)
