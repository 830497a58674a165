"""Trains a tiny vision transformer on handwritten digits, as it is and patched.

    pip install "backfuse[examples]"
    python examples/vit.py
    python examples/vit.py --policy full --steps 1000

The model is that of transformers, the 1,797 images of 8 x 8 pixels are scikit-learn's. Both runs
start from the same weights and see the same batches; what differs is what the layers hold between
their forward and their backward pass.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import backfuse
from backfuse.bench.measure import kept_bytes_measured
from backfuse.bench.options import check_positive

BATCH_SIZE, LEARNING_RATE, WARMUP = 64, 1e-3, 20


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `[n, 1, 8, 8]` and labels to train on, and a fifth of all to test with."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order.split([len(x) // 5, len(x) - len(x) // 5])
    return x[train], y[train], x[test], y[test]


def make_model(hidden_size: int = 64, layers: int = 4) -> ViTForImageClassification:
    """A random one, the same each time."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=hidden_size,
        intermediate_size=4 * hidden_size, num_hidden_layers=layers, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def train(model: ViTForImageClassification, steps: int) -> tuple[float, float, float]:
    """Loss of the last ten steps, accuracy on the test images, and seconds of the steps."""
    x, y, x_test, y_test = digits()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        rows = torch.randint(len(x), (BATCH_SIZE,), generator=generator)
        loss = model(pixel_values=x[rows], labels=y[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        right = model.eval()(pixel_values=x_test).logits.argmax(-1) == y_test
    model.train()
    last = losses[-10:]
    return sum(last) / len(last), right.float().mean().item(), seconds


def main(arguments: list[str] | None = None) -> list[tuple[str, float, float, float, int]]:
    """Trains twice and prints a table; returns its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of each run (default: 150)")
    parser.add_argument("--policy", default="selective", help="what patched layers keep")
    options = parser.parse_args(arguments)
    check_positive("steps", options.steps)
    model = make_model().train()
    patched = copy.deepcopy(model)
    print(backfuse.patch(patched, options.policy), "\n")
    images = digits()[0][:BATCH_SIZE]
    rows = []
    print(f"{'':10} {'loss':>8} {'accuracy':>9} {'seconds':>8} {'held, KiB':>10}")
    for name, one in (("as it is", model), ("patched", patched)):
        held = kept_bytes_measured(lambda x, run=one: run(pixel_values=x).logits, images)
        loss, accuracy, seconds = train(one, options.steps)
        rows.append((name, loss, accuracy, seconds, held))
        print(f"{name:10} {loss:8.4f} {accuracy:9.1%} {seconds:8.1f} {held / 1024:10,.0f}")
    return rows


if __name__ == "__main__":
    main()
