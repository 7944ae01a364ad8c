"""Twenty steps of training: the same losses as with the model's own attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import outside
import pytest
import torch
from families import BY_NAME, padding, tokens
from transformers import PreTrainedModel

STEPS = 20


def batches() -> list[dict[str, torch.Tensor]]:
    """Three batches again and again, so that the losses fall; the second half of them padded."""
    found = []
    for step in range(STEPS):
        mask = padding([17, 11], 17, "right") if step % 3 else torch.ones(2, 17, dtype=torch.long)
        ids = tokens(2, 17).roll(step % 3, 1) * mask
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


def losses(model: Any) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    found = []
    for batch in batches():
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def assert_same_losses(actual: list[float], expected: list[float]) -> None:
    assert len(actual) == len(expected) == STEPS
    assert expected[-1] < 0.9 * expected[0]
    assert actual == pytest.approx(expected, rel=2e-4)


def through_the_interface(name: str) -> Callable[[str], PreTrainedModel]:
    def model(implementation: str) -> PreTrainedModel:
        built = BY_NAME[name].build(attention_dropout=0.0)
        built.set_attn_implementation(implementation)
        return built

    return model


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_a_training_loop(name: str) -> None:
    model = through_the_interface(name)
    assert_same_losses(losses(model("heedful")), losses(model("eager")))


@pytest.mark.parametrize("name", ["longformer", "bloom", "falcon_40b"])
def test_a_training_loop_of_a_patched_model(name: str) -> None:
    own, ours = outside.pair(name)
    assert_same_losses(losses(ours), losses(own))


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches() for row in range(2)]
    found = {}
    for implementation in ("eager", "heedful"):
        model = through_the_interface("mistral")(implementation)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        found[implementation] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found["eager"]) == STEPS
    assert found["heedful"] == pytest.approx(found["eager"], rel=2e-4, abs=2e-4)
