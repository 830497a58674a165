"""`backfuse bench block`: time, held bytes and peak of a stack of blocks, against the alternatives.

Every contender runs the same layers on the same input with the same output gradient, and has to
find the same gradients. Times are ratios to plain PyTorch within a round, rounds run in
alternating order; held bytes and peaks come from the allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from . import measure, rivals
from .block_results import Contender, Results, Setup
from .options import DTYPES, check_positive, progress_bar, require, writable_folder

#: Gradients may differ by this much of the reference's largest one before a row is marked.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def build(setup: Setup, results: Results) -> list[tuple[str, Callable[[], Contender]]]:
    """The contenders that can run here, unbuilt; plain first. Notes go to `results`."""
    torch.manual_seed(setup.seed)
    sizes = (setup.hidden_size, setup.intermediate_size, setup.heads, setup.num_key_value_heads)
    layers, kind = rivals.llama_layers(
        setup.layers, *sizes, device=setup.device, dtype=DTYPES[setup.dtype]
    )
    results.notes.append(f"plain is {kind}")
    shared = dict(nn.ModuleList(layers).named_parameters())

    def rival(name: str) -> Callable[[], Contender]:
        return lambda: Contender(name, rivals.RIVALS[name](layers), shared)

    def ours(policy: str) -> Callable[[], Contender]:
        return lambda: _stack(setup, policy, layers)

    chosen = [name for name in rivals.RIVALS if name in setup.providers or name == "plain"]
    makers: list[tuple[str, Callable[[], Contender]]] = []
    for name in chosen:
        reason = rivals.missing(name, setup.device)
        if reason:
            results.notes.append(f"{name} left out: {reason}")
        else:
            makers.append((name, rival(name)))
    if "backfuse" in setup.providers:
        makers += [(f"backfuse {policy}", ours(policy)) for policy in setup.policies]
    return makers


def _stack(setup: Setup, policy: str, layers: Sequence[nn.Module]) -> Contender:
    from backfuse import BlockSpec, BlockStack

    spec = BlockSpec(
        hidden_size=setup.hidden_size,
        intermediate_size=setup.intermediate_size,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.num_key_value_heads,
    )
    stack = BlockStack(
        spec, len(layers), policy=policy, device=setup.device, dtype=DTYPES[setup.dtype]
    )
    for mine, theirs in zip(stack.layers, layers, strict=True):
        mine.load_state_dict(theirs.state_dict())

    def run(x: Tensor, rotary: rivals.Rotary) -> Tensor:
        return stack(x, position_embeddings=rotary)

    return Contender(f"backfuse {policy}", run, dict(stack.layers.named_parameters()))


class Step:
    """Forward and backward of a contender on one fixed input."""

    def __init__(self, setup: Setup) -> None:
        generator = torch.Generator().manual_seed(setup.seed + 1)
        shape = (setup.batch_size, setup.seq_len, setup.hidden_size)
        dtype = DTYPES[setup.dtype]
        head_dim = setup.hidden_size // setup.heads
        # Made on the CPU, so that every device gets the same numbers.
        x, dy = (torch.randn(shape, generator=generator).to(setup.device, dtype) for _ in range(2))
        self.x, self.dy = x.requires_grad_(), dy
        self.rotary = rivals.rotary_tables(
            setup.seq_len, head_dim, device=setup.device, dtype=dtype
        )
        self.device = setup.device

    def clear(self, contender: Contender) -> None:
        """Drops every gradient, so that the next step makes its own."""
        self.x.grad = None
        for parameter in contender.parameters.values():
            parameter.grad = None

    def __call__(self, contender: Contender) -> None:
        contender.run(self.x, self.rotary).backward(self.dy)

    def gradients(self, contender: Contender) -> dict[str, Tensor]:
        """The input's gradient and the parameters', by name, after a step."""
        owners = {"x": self.x, **contender.parameters}
        return {name: owner.grad for name, owner in owners.items() if owner.grad is not None}

    def examine(self, contender: Contender) -> dict[str, Tensor]:
        """Measures bytes, after a warm-up where a first run allocates more; returns gradients."""
        self.clear(contender)
        if contender.name.startswith("compile") or torch.device(self.device).type == "cuda":
            self(contender)
            self.clear(contender)
        contender.held_bytes = measure.held_bytes(
            lambda x: contender.run(x, self.rotary), self.x, device=self.device
        )
        step = measure.allocator_trace(lambda: self(contender), self.device)
        gradients = self.gradients(contender)
        weights = sum(gradient.nbytes for name, gradient in gradients.items() if name != "x")
        contender.peak_bytes = step.peak_bytes - weights
        return gradients


def gradient_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference in any tensor, as a share of the reference's largest value there.

    Infinite if there is a gradient on one side only.
    """
    if gradients.keys() != reference.keys():
        return float("inf")
    return max(
        float((gradients[name] - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        for name, theirs in reference.items()
    )


def bench(setup: Setup) -> Results:
    """Measures every contender; what is done when the user presses Ctrl-C is kept."""
    results = Results(setup)
    try:
        _bench(setup, results)
    except KeyboardInterrupt:
        results.interrupted = True
        results.notes.append("interrupted: the table holds what was measured until then")
    return results


def _bench(setup: Setup, results: Results) -> None:
    step = Step(setup)
    makers = build(setup, results)
    reference: dict[str, Tensor] = {}
    with progress_bar(total=len(makers) * (setup.rounds + 1), unit="run") as bar:
        for name, make in makers:
            bar.set_description(f"{name}: bytes")
            try:
                contender = make()
                gradients = step.examine(contender)
            except RuntimeError as error:
                if name not in rivals.RIVALS or name == "plain":
                    raise  # a failure of our own is a bug, not a missing row
                results.notes.append(f"{name} failed: {str(error).splitlines()[0]}")
                bar.update(setup.rounds + 1)
                continue
            reference = reference or gradients
            contender.gradient_error = gradient_error(gradients, reference)
            if contender.gradient_error > TOLERANCE[DTYPES[setup.dtype]]:
                results.notes.append(f"{name} does NOT find plain's gradients")
            results.contenders.append(contender)
            step.clear(contender)
            bar.update()
        reference.clear()
        named = {contender.name: contender for contender in results.contenders}
        for index, name in measure.interleaved(list(named), setup.rounds):
            bar.set_description(f"{name}: round {index + 1} of {setup.rounds}")
            contender = named[name]
            contender.seconds.append(measure.seconds(partial(step, contender), setup.device))
            step.clear(contender)
            bar.update()


def run(
    setup: Setup, csv: Path | None = None, plot: Path | None = None, threads: int | None = None
) -> int:
    """The command: measures, prints, writes.

    Args:
        setup: what to measure.
        csv: file for the table; None for no file.
        plot: file for the picture; None for no file.
        threads: of PyTorch; None for its own choice.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        OSError: if a file cannot be written.
    """
    require("tqdm")
    if plot:
        require("matplotlib")
    for path in (csv, plot):
        if path:
            writable_folder(path.parent)
    if threads is not None:
        check_positive("threads", threads)
        torch.set_num_threads(threads)
    print(setup.title())
    results = bench(setup)
    print(results.table())
    for note in results.notes:
        print(f"note: {note}")
    if csv and results.contenders:
        results.save_csv(csv)
        print(f"wrote {csv}")
    if plot and any(contender.seconds for contender in results.contenders):
        results.save_plot(plot)
        print(f"wrote {plot}")
    return 130 if results.interrupted else 0
