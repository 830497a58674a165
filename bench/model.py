"""A small byte-level language model around any stack of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import rivals
from .data import VOCABULARY
from .options import check_positive


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a small Llama-style model.

    Attributes:
        layers: blocks.
        hidden_size: width, a multiple of 32.
        seq_len: bytes of context.

    Raises:
        ValueError: for sizes that are not positive or do not divide.
    """

    layers: int
    hidden_size: int
    seq_len: int

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "seq_len"):
            check_positive(name, getattr(self, name))
        if self.hidden_size % 32:
            raise ValueError(f"hidden_size is {self.hidden_size}, expected a multiple of 32")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return 64 if self.hidden_size % 64 == 0 and self.hidden_size >= 512 else 32

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden_size // self.head_dim

    @property
    def intermediate_size(self) -> int:
        """FFN width: 8/3 of the hidden size, rounded up to a multiple of 32."""
        return -(-8 * self.hidden_size // 96) * 32


class PlainStack(nn.Module):
    """Plain PyTorch blocks run in one of the ways of `rivals`; called like a `BlockStack`."""

    def __init__(self, size: ModelSize, way: str) -> None:
        super().__init__()
        sizes = (size.hidden_size, size.intermediate_size, size.heads)
        self.layers = nn.ModuleList(rivals.PlainBlock(*sizes) for _ in range(size.layers))
        self._run = rivals.RIVALS[way](list(self.layers))

    def forward(self, hidden_states: Tensor, *, position_embeddings: rivals.Rotary) -> Tensor:
        return self._run(hidden_states, position_embeddings)


class ByteModel(nn.Module):
    """Embedding, blocks, final norm, head.

    Args:
        size: the sizes.
        stack: maps hidden states [B, T, hidden] to hidden states, given `position_embeddings`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, size: ModelSize, stack: nn.Module) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(VOCABULARY, size.hidden_size)
        self.stack = stack
        self.norm = rivals.PlainRMSNorm(size.hidden_size, 1e-6)
        self.head = nn.Linear(size.hidden_size, VOCABULARY, bias=False)
        cos, sin = rivals.rotary_tables(size.seq_len, size.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def run_stack(self, hidden_states: Tensor) -> Tensor:
        """The blocks alone, [B, T, hidden] to the same."""
        length = hidden_states.shape[1]
        tables = (self.cos[:, :length], self.sin[:, :length])
        return self.stack(hidden_states, position_embeddings=tables)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, T, 256] from bytes, int64 [B, T]."""
        return self.head(self.norm(self.run_stack(self.embedding(inputs))))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a byte."""
        return F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def generate(
    model: ByteModel, prompt: bytes, length: int, generator: torch.Generator, temperature: float
) -> str:
    """The prompt and `length` sampled bytes after it, what is not printable as `·`."""
    device = model.head.weight.device
    text = list(prompt)
    for _ in range(length):
        inputs = torch.tensor([text[-model.size.seq_len :]], device=device)
        chances = (model(inputs)[0, -1].float().cpu() / temperature).softmax(-1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return printable(text)


def printable(text: Sequence[int]) -> str:
    """Bytes as text that cannot steer a terminal."""
    return "".join(chr(byte) if 32 <= byte < 127 or byte == 10 else "·" for byte in text)
