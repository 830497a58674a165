"""Fine-tunes a tiny Llama with LoRA, as it is and patched.

    pip install "backfuse[examples,bench]"
    python examples/finetune_lora.py
    python examples/finetune_lora.py --policy full --rank 4 --steps 300

A base model of transformers learns the Python standard library's source, byte by byte. Then PEFT's
adapters, around all its projections, learn English: the prose of Python's help topics. Both runs
start from the same base and adapters and see the same batches; what differs is what the layers hold
between their forward and their backward pass. The weights below the adapters are frozen: a patched
layer holds nothing for their gradients, and computes the adapters inside its own passes.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import time
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import backfuse
from backfuse.bench.data import VOCABULARY, Corpus, load
from backfuse.bench.measure import allocator_trace, kept_bytes_measured
from backfuse.bench.options import check_positive

BATCH_SIZE, SEQ_LEN = 8, 128


def make_base(hidden_size: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """A random one, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=352,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: nn.Module, text: Corpus, steps: int, rate: float) -> tuple[float, float, float]:
    """Losses of the first ten and of the last ten steps, and seconds of all."""
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in range(steps):
        step(model, *text.batch("train", BATCH_SIZE, SEQ_LEN, generator), losses)
        optimizer.step()
        optimizer.zero_grad()
    few = min(10, steps)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    return first, last, time.perf_counter() - start


def step(model: Any, inputs: torch.Tensor, targets: torch.Tensor, losses: list[float]) -> None:
    """Forward and backward."""
    logits = model(input_ids=inputs, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    losses.append(loss.item())


def main(arguments: list[str] | None = None) -> list[tuple[str, float, int, int]]:
    """Trains and prints a table; returns name, loss, held and peak bytes of its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="with adapters (default: 100)")
    parser.add_argument("--base-steps", type=int, default=100, help="before them (default: 100)")
    parser.add_argument("--rank", type=int, default=8, help="of each adapter (default: 8)")
    parser.add_argument("--policy", default="selective", help="what patched layers keep")
    options = parser.parse_args(arguments)
    for name in ("steps", "base_steps", "rank"):
        check_positive(name, getattr(options, name))
    base = make_base().train()
    _, loss, seconds = train(base, load(seq_len=SEQ_LEN), options.base_steps, 3e-3)
    print(f"base: loss {loss:.3f} on Python after {options.base_steps} steps, {seconds:.0f} s\n")
    base.zero_grad(set_to_none=True)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"
    )
    plain = peft.get_peft_model(base, config)
    patched = copy.deepcopy(plain)
    print(backfuse.patch(patched, options.policy), "\n")
    prose = load(pydoc_data.topics.__file__, SEQ_LEN)
    ids, targets = prose.batch("train", BATCH_SIZE, SEQ_LEN, torch.Generator().manual_seed(2))
    rows = []
    columns = f"{'from loss':>10} {'to':>8} {'seconds':>8} {'held, KiB':>10} {'peak, KiB':>10}"
    print(f"{'':10} {columns}")
    for name, one in (("as it is", plain), ("patched", patched)):
        held = kept_bytes_measured(lambda x, run=one: run(input_ids=x, use_cache=False).logits, ids)
        peak = allocator_trace(lambda run=one: step(run, ids, targets, [])).peak_bytes
        one.zero_grad(set_to_none=True)
        first, last, seconds = train(one, prose, options.steps, 3e-3)
        rows.append((name, last, held, peak))
        print(
            f"{name:10} {first:10.4f} {last:8.4f} {seconds:8.1f} {held / 1024:10,.0f} "
            f"{peak / 1024:10,.0f}"
        )
    return rows


if __name__ == "__main__":
    main()
