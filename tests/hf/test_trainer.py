"""Transformers' Trainer trains the adapter's models: what a step does, and what resuming gives."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("timm")

from dino.hf import DinoDetrForObjectDetection  # noqa: E402
from dino.layers import MultiScaleDeformableAttention  # noqa: E402

from .tiny_model import Samples, tiny_model, to_batch  # noqa: E402


def make_trainer(folder, model=None, counts=(2, 1, 0), **settings):
    defaults = {"per_device_train_batch_size": 1, "max_steps": 3, "save_strategy": "no", "optim": "sgd"}
    defaults |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = transformers.TrainingArguments(folder, **{**defaults, **settings})
    data = Samples(*counts)
    return transformers.Trainer(
        model or tiny_model(), arguments, data_collator=to_batch, train_dataset=data, eval_dataset=data
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_weights(first, second, **tolerance):
    first, second = (x if isinstance(x, dict) else weights(x) for x in (first, second))
    torch.testing.assert_close(first, second, **(tolerance or {"rtol": 0, "atol": 0}))


def test_training_lowers_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=20, optim="adamw_torch", learning_rate=2e-3)
    start, before = weights(trainer.model), trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    still = [name for name in trained if torch.equal(start[name], trainer.model.get_parameter(name))]
    assert trained
    assert not still


def test_losses_without_denoising_are_those_of_an_evaluation(tmp_path):
    """One picture a batch, so nothing depends on the batch: the mean loss of the three pictures."""
    trainer = make_trainer(tmp_path, tiny_model(num_denoising=0), per_device_eval_batch_size=1)
    with torch.no_grad():
        losses = [trainer.model(**to_batch([sample])).loss.item() for sample in trainer.train_dataset]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_accumulation_averages_the_losses_of_the_parts(tmp_path):
    """Each part has a normalizer of its own; `dino train` divides by that of the whole step."""
    model = tiny_model(num_denoising=0)
    trainer = make_trainer(
        tmp_path, model, counts=(3, 1), gradient_accumulation_steps=2, max_steps=1, lr_scheduler_type="constant"
    )
    other = tiny_model(num_denoising=0).train()
    (sum(other(**to_batch([sample])).loss for sample in trainer.train_dataset) / 2).backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), trainer.args.max_grad_norm)
    torch.optim.SGD(other.parameters(), lr=trainer.args.learning_rate).step()
    trainer.train()
    assert_equal_weights(model, other, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_changes_no_weights(tmp_path):
    """The attention of encoder and decoder runs twice a step: forward, and again for the gradients."""
    models, runs = [], []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing)
        models.append(trainer.model)
        calls = []
        for module in trainer.model.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        runs.append(len(calls))
    assert runs[1] == 2 * runs[0] > 0
    assert_equal_weights(*models, rtol=1e-5, atol=1e-6)


def test_bfloat16(tmp_path):
    """Weights stay float32, and the losses are near those of float32."""
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, tiny_model(num_denoising=0), bf16=bf16, max_steps=2)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torch_compile(tmp_path):
    """The losses are those of the plain model."""
    losses = []
    for compiled in (False, True):
        trainer = make_trainer(tmp_path, tiny_model(num_denoising=0), torch_compile=compiled, max_steps=2)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("stop", [2, 3], ids=["within an epoch", "after an epoch"])
def test_resuming_is_exact(tmp_path, stop):
    """Order of the pictures, denoising noise, optimizer and schedule."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": stop, "optim": "adamw_torch"}
    whole = make_trainer(tmp_path, **settings, save_total_limit=3)
    whole.train()
    resumed = make_trainer(tmp_path, tiny_model(seed=1), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 5
    assert_equal_weights(whole.model, resumed.model)


def test_the_best_model_is_kept(tmp_path):
    """By the loss of the evaluation: of a training that gets worse, that of the first step."""
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        optim="adamw_torch",
        learning_rate=0.1,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{1 + losses.index(min(losses))}"
    assert_equal_weights(DinoDetrForObjectDetection.from_pretrained(best), trainer.model)
    assert json.loads((best / "config.json").read_text())["id2label"] == {"0": "red", "1": "green", "2": "blue"}


def test_labels_move_to_the_device_of_the_model(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    batch = trainer._prepare_inputs(to_batch(list(trainer.train_dataset)))
    tensors = [batch["pixel_values"], *(value for label in batch["labels"] for value in label.values())]
    assert {x.device.type for x in tensors} == {"meta"}


class Raw(Samples):
    """Samples under names that the model's forward does not have; a collator renames them."""

    def __getitem__(self, index):
        return {"image": self.samples[index]["pixel_values"], "objects": self.samples[index]["labels"]}


def raw_to_batch(samples):
    return {"pixel_values": torch.stack([s["image"] for s in samples]), "labels": [s["objects"] for s in samples]}


def test_samples_of_other_names_need_their_columns_kept(tmp_path):
    """Trainer drops what `forward` does not name before the collator sees it."""
    for keep in (True, False):
        trainer = make_trainer(tmp_path, remove_unused_columns=not keep)
        trainer.train_dataset, trainer.data_collator = Raw(2, 1), raw_to_batch
        if keep:
            trainer.train()
        else:
            with pytest.raises(KeyError, match="image"):
                trainer.train()


def test_predictions_of_a_plain_trainer(tmp_path):
    """What a `compute_metrics` written for DETR expects: batches of (loss_dict, logits, boxes, …), and their labels."""
    trainer = make_trainer(tmp_path, eval_do_concat_batches=False, per_device_eval_batch_size=2)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"AP": 0.5}
    assert trainer.evaluate()["eval_AP"] == 0.5
    (prediction,) = seen
    shapes = [(batch[1].shape, batch[2].shape) for batch in prediction.predictions]
    assert shapes == [((n, 20, 3), (n, 20, 4)) for n in (2, 1)]
    assert [len(labels["boxes"]) for batch in prediction.label_ids for labels in batch] == [2, 1, 0]
