"""TRL's supervised fine-tuning of a patched model; run where TRL is installed."""

import string
import warnings

import pytest
import torch
from tiny_models import make_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backfuse import patch
from backfuse.blocks.adapters import patched

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def never_own(monkeypatch):
    def refuse(layer, original, state, reason, args, kwargs):
        raise AssertionError(f"{state.name} runs its own forward: {reason}")

    monkeypatch.setattr(patched, "_own_forward", refuse)


def tokenizer():
    """A token for each of a few characters."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase, " ", "."]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def losses(folder, policy=None, peft=None, flash=False, **arguments):
    """Each step's loss, and those of the evaluation."""
    words = string.__doc__.lower().replace("\n", " ").split(" ")
    rows = [" ".join(words[i : i + 2 + i % 3]) for i in range(32)]
    data = datasets.Dataset.from_dict({"text": rows})
    model = make_model("llama")
    if policy is not None:
        if flash:
            model.config._attn_implementation = "flash_attention_2"  # never called
        assert len(patch(model, policy).fused) == 2
    config = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=8, logging_steps=1,
        learning_rate=3e-3, report_to=[], use_cpu=True, bf16=False, seed=7, save_strategy="no",
        disable_tqdm=True, **{"max_length": 48, **arguments},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args=config, train_dataset=data, processing_class=tokenizer(), peft_config=peft
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # off zero, so that both factors learn
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(found) == 8
    return torch.tensor(found)


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("adapted", [False, True])
def test_the_losses_are_the_same(adapted, tmp_path):
    def run(policy=None, **arguments):
        return losses(tmp_path, policy, lora() if adapted else None, **arguments)

    expected = run()  # checkpointing is TRL's default
    assert expected[-1] < expected[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*replay")
        kept = run("keep", gradient_checkpointing=False)
        found = [run("keep"), run("lean")]
        if not adapted:
            found.append(run("lean", gradient_checkpointing_kwargs={"selective": True}))
            found.append(run("lean", gradient_checkpointing_kwargs={"use_reentrant": True}))
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=0)
    for other in found:
        assert torch.equal(other, kept)  # bitwise, as all policies


def test_padding_free_batches_are_packed_ones(tmp_path):
    expected = losses(tmp_path, gradient_checkpointing=False)
    found = losses(tmp_path, "lean", flash=True, padding_free=True, max_length=None)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
