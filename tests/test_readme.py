"""What the README says is so: figures, names, files and code."""

import csv
import re
from pathlib import Path

import pytest
import torch

import backfuse
from backfuse import BlockSpec, BlockStack, Policy, block_flops, kept_bytes
from backfuse.bench import report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def rows_of(heading):
    """The cells of the table whose header line starts with `heading`."""
    lines = README[README.index(heading) :].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return table


def test_it_is_short_enough_to_read():
    assert len(README.splitlines()) <= 150


def test_files_it_points_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert any(link.endswith(".png") for link in links)
    for link in links:
        assert (ROOT / link).exists(), link


def test_what_was_measured_is_what_the_pages_show():
    """After a change of a CSV, or of a page by hand: `backfuse bench report`."""
    for path, text in report.render(ROOT).items():
        assert path.read_text() == text, f"{path} is stale; this writes it: backfuse bench report"


def test_measured_table_is_the_checked_in_measurement():
    with open(ROOT / "bench" / "results" / "cpu" / "results.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["tokens"] == "4096"]
    measured = {f"{row['provider']} {row['policy']}".strip(): row for row in rows}
    table = rows_of("| | time")
    assert len(table) >= 10
    for name, time, held, peak in table:
        row = measured[name.replace("backfuse", "backfuse-reference")]
        assert time == f"{float(row['vs_eager']):.2f}", name
        assert held == f"{float(row['kept_bytes']) / 4096 / 8 / 1024:.1f}", name
        assert peak == f"{float(row['peak_bytes']) / 2**20:,.0f}", name


def test_policy_table_is_what_the_memory_model_says():
    spec, sizes = BlockSpec(4096, 14336, 32, 8), {"batch_size": 1, "seq_len": 8192}
    hidden = 2 * 8192 * 8192 * spec.q_size  # half of Q K^T: what causality spares
    for name, _, kib, extra, _ in rows_of("| policy | keeps"):
        if name == "segments":
            continue
        costs = kept_bytes(spec, name, dtype=torch.bfloat16, **sizes)
        assert kib == f"{sum(costs.values()) / 8192 / 1024:.1f}"
        flops = block_flops(spec, name, dtype=torch.bfloat16, **sizes)
        again = flops.recompute - (hidden if name == "full" else 0)
        base = flops.forward + flops.backward - int(3.5 * hidden)
        assert extra.replace(" %", "") in (f"{100 * again / base:.1f}", f"{100 * again / base:.0f}")


def test_activation_table_names_them_all():
    from backfuse.blocks.policy import ACTIVATION_NAMES

    assert [row[0] for row in rows_of("| activation |")] == list(ACTIVATION_NAMES)


def test_policy_code_runs():
    code = next(block for block in CODE if "Policy.parse" in block)
    names = {"spec": BlockSpec(8, 16, 2), "torch": torch}
    names |= {"Policy": Policy, "BlockStack": BlockStack, "kept_bytes": kept_bytes}
    names |= {"apply": backfuse.apply, "plan": backfuse.plan}
    names["stack"] = BlockStack(names["spec"], 32)
    exec(code, names)


def test_patching_code_runs(capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    code = next(block for block in CODE if "patch(model" in block)
    exec(code, {"backfuse": backfuse, "model": model})
    assert "fused" in capsys.readouterr().out and backfuse.unpatch(model) == 2


@pytest.mark.parametrize("way", ["before", "after"])
def test_before_and_after_give_the_same(way):
    """The README's six lines, on Hugging Face's own layers."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0)
    start = torch.randn(1, 9, 32, requires_grad=True)
    angles = backfuse.rope_cos_sin(torch.arange(9)[None], 8)
    expected = layer(start, position_embeddings=angles)
    code = next(block for block in CODE if "# before" in block)
    before, after = code.split("# after")
    names = {
        "x": start, "layers": [layer], "layer": layer, "config": config, "angles": angles,
        "checkpoint": torch.utils.checkpoint.checkpoint, "BlockSpec": BlockSpec,
        "TransformerBlock": backfuse.TransformerBlock,
    }  # fmt: skip
    exec(before if way == "before" else "# after" + after, names)
    torch.testing.assert_close(names["x"], expected)
    grads = [torch.autograd.grad(y.square().sum(), start)[0] for y in (names["x"], expected)]
    torch.testing.assert_close(*grads)


def test_named_families_are_the_ones_that_are_read():
    from backfuse.blocks.adapters.hf_config import FAMILIES

    told = {
        "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen 2", "qwen3": "3", "gemma": "Gemma 1",
        "gemma2": "Gemma", "gemma3_text": "to 3", "phi3": "Phi-3", "olmo2": "OLMo 2",
        "smollm3": "SmolLM3", "starcoder2": "StarCoder2", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX",
        "granite": "Granite", "bert": "BERT", "roberta": "RoBERTa", "vit": "ViT", "deit": "DeiT",
        "dinov2": "DINOv2",
    }  # fmt: skip
    assert told.keys() == FAMILIES.keys() and all(word in README for word in told.values())
