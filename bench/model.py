"""A small byte-level language model around any stack of blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backfuse import BlockSpec

from .data import VOCABULARY
from .options import check_positive
from .plain import PlainRMSNorm, rotary_tables


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

    @property
    def spec(self) -> BlockSpec:
        """One of its blocks."""
        return BlockSpec(self.hidden_size, self.intermediate_size, self.heads)


class ByteModel(nn.Module):
    """Embedding, blocks, final norm, head.

    Args:
        spec: of a block.
        seq_len: bytes of context.
        stack: maps hidden states [B, T, hidden] to hidden states, given `position_embeddings`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: BlockSpec, seq_len: int, stack: nn.Module) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.embedding = nn.Embedding(VOCABULARY, spec.hidden_size)
        self.stack = stack
        self.norm = PlainRMSNorm(spec.hidden_size, 1e-6)
        self.head = nn.Linear(spec.hidden_size, VOCABULARY, bias=False)
        cos, sin = rotary_tables(seq_len, spec.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def around(self, stack: nn.Module) -> ByteModel:
        """A model with another stack, which shares all other parameters with this one."""
        other = copy.copy(self)
        other._modules = {**self._modules, "stack": stack}
        return other

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
        logits = self(inputs).flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets.flatten())


@torch.no_grad()
def generate(
    model: ByteModel, prompt: bytes, length: int, generator: torch.Generator, temperature: float
) -> str:
    """The prompt and `length` sampled bytes after it, what is not printable as `·`."""
    device = model.head.weight.device
    text = list(prompt)
    for _ in range(length):
        inputs = torch.tensor([text[-model.seq_len :]], device=device)
        chances = (model(inputs)[0, -1].float().cpu() / temperature).softmax(-1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return printable(text)


def printable(text: Sequence[int]) -> str:
    """Bytes as text that cannot steer a terminal."""
    return "".join(chr(byte) if 32 <= byte < 127 or byte == 10 else "·" for byte in text)
