"""`TransformerBlock`: one block as a module, with Hugging Face's parameter names and call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.peft import Live, unwrap
from .context import Context
from .function import block
from .inputs import check_chunk_size, check_impl, check_offload_dir
from .lora import Adapters, LoRA
from .policy import Policy, PolicyLike
from .spec import LAYER_SCALE, BlockSpec, check_spec

#: The one parameter that stands in no module of its own.
SINKS = "self_attn.sinks"


class Norm(nn.Module):
    """The parameters of a norm; the block does the arithmetic.

    Args:
        width: `[width]` each of weight and bias.
        bias: whether there is one.
        offset: added to the weight in use, so that the weight starts at `1 - offset`.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, width: int, bias: bool, offset: float, device: Any, dtype: Any) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity: a weight of 1 in use, no bias."""
        nn.init.constant_(self.weight, 1.0 - self.offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv1D(nn.Module):
    """The parameters of a projection whose weight is transposed; the block does the arithmetic.

    Args:
        shape: of the weight, `[in, out]`; the bias is `[out]`.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, shape: tuple[int, ...], bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[1:], device=device, dtype=dtype))


class LayerScale(nn.Module):
    """The factors of a half's output; the block does the arithmetic.

    Args:
        width: `[width]` of the parameter, which starts at 1.
        device: of the parameter.
        dtype: of the parameter.
    """

    def __init__(self, width: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width, device=device, dtype=dtype))


def parameter_modules(spec: BlockSpec, device: Any, dtype: Any) -> dict[str, nn.Module]:
    """The modules that hold a block's parameters, by Hugging Face's names."""
    modules: dict[str, nn.Module] = {}
    shapes = spec.parameters()
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        if name in LAYER_SCALE.values():
            modules[path] = LayerScale(shape[0], device, dtype)
        if kind != "weight":
            continue
        bias = f"{path}.bias" in shapes
        if len(shape) == 2 and spec.conv1d:
            modules[path] = Conv1D(shape, bias, device, dtype)
        elif len(shape) == 2:
            modules[path] = nn.Linear(shape[1], shape[0], bias=bias, device=device, dtype=dtype)
        else:
            modules[path] = Norm(shape[0], bias, spec.norm_offset, device, dtype)
    return modules


class TransformerBlock(nn.Module):
    """One transformer block that keeps for its backward pass what its policy says.

    Its parts hold parameters and are never called: hooks on them do not run; those on the block do.

    Args:
        spec: what the block is.
        policy: a name (`keep`, `selective`, `lean`, `full`, `offload`), a mapping from activations
            to actions, or a `Policy`.
        chunk_size: tokens that the FFN and the projections work on at a time; None: the device's
            default (1,024 on a CPU, 4,096 on a GPU). It bounds the scratch of a pass.
        impl: which operations run: `"triton"` (kernels), `"reference"` (PyTorch), or `"auto"`: the
            kernels for bf16 and fp16 on a GPU, else the reference; `"sdpa"`, `"fa3"`, `"fa4"`: the
            kernels with somebody else's attention (see `kernels/cores/choose.py`).
        ffn_strategy: how the kernels rebuild a dropped `preact`: `"split"` (into scratch),
            `"fused"` (inside the backward kernel), or `"auto"`: as measured on this device by
            `backfuse tune`, else split.
        offload_dir: a folder for what the policy offloads, which is then kept in files; None: it is
            kept in host memory.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a policy that is unknown, not available, or drops `x` (which takes a
            `BlockStack`: something must rebuild it).
    """

    def __init__(
        self,
        spec: BlockSpec,
        policy: PolicyLike = "selective",
        *,
        chunk_size: int | None = None,
        impl: str = "auto",
        ffn_strategy: str = "auto",
        offload_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = check_spec(spec)
        self.policy = policy
        self.chunk_size = check_chunk_size(chunk_size)
        check_impl(impl, ffn_strategy)
        self.impl, self.ffn_strategy = impl, ffn_strategy
        self.offload_dir = check_offload_dir(offload_dir)
        #: How the block is split over ranks, if it is: see `parallel.py`.
        self.parallel: Any = None
        #: The ranks that share the tokens of every sequence, if any do: see `context.py`.
        self.context: Context | None = None
        for path, module in parameter_modules(spec, device, dtype).items():
            parent, _, name = path.rpartition(".")
            if parent and parent not in self._modules:
                self.add_module(parent, nn.Module())
            self.get_submodule(parent).add_module(name, module)
        if spec.attention_sinks:
            sinks = torch.empty(spec.num_attention_heads, device=device, dtype=dtype)
            self.get_submodule("self_attn").register_parameter("sinks", nn.Parameter(sinks))
        self._places = tuple((name, tuple(name.split("."))) for name in spec.parameters())
        self.reset_parameters()

    @property
    def policy(self) -> Policy:
        """What the block keeps; may be set to anything `Policy.parse` takes."""
        return self._policy

    @policy.setter
    def policy(self, value: PolicyLike) -> None:
        policy = Policy.parse(value)
        policy.check_available()
        if not policy.keeps("x"):
            raise ValueError(
                f"policy is {policy}, expected one that keeps x: a block alone has nothing to "
                "rebuild its input from; put it in a BlockStack with segments"
            )
        self._policy = policy

    def reset_parameters(self) -> None:
        """Projections and sinks from N(0, 0.02), biases 0, norms the identity."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | Conv1D):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.ones_(module.lambda1)
        if self.spec.attention_sinks:
            nn.init.normal_(self.get_parameter(SINKS), std=0.02)

    def weights(self) -> tuple[dict[str, Tensor], Adapters]:
        """The parameters by name, in the spec's order, and the active adapters with theirs.

        Raises:
            TypeError: if something else stands in a projection's place (a quantised layer, a
                parametrisation, an adapter that is not LoRA): the block reads weights, and would
                silently drop whatever else that module does.
        """
        weights: dict[str, Tensor] = {}
        adapters: dict[str, tuple[LoRA, ...]] = {}
        for name, (*path, kind) in self._places:
            module: Any = self
            for step in path:
                module = None if module is None else module._modules.get(step)
            if type(module) not in (nn.Linear, Norm, Conv1D, LayerScale) and name != SINKS:
                module = self._unwrap(".".join(path), module, kind, weights, adapters)
            weights[name] = getattr(module, kind)
        return weights, tuple(adapters.items())

    @staticmethod
    def _unwrap(
        path: str,
        module: Any,
        kind: str,
        weights: dict[str, Tensor],
        adapters: dict[str, tuple[LoRA, ...]],
    ) -> nn.Module:
        """What stands below PEFT's module; notes its adapters."""
        reason = "a block reads its weight and would drop what else it does"
        try:
            live = unwrap(module)
        except TypeError as error:
            reason, live = str(error), Live(module)
        if type(live.module) not in (nn.Linear, Norm, Conv1D, LayerScale):
            raise TypeError(
                f"{path} is a {type(live.module).__name__}, expected a plain torch.nn.Linear "
                f"(LoRA beside it or not) or the block's own norm: {reason}"
            )
        if live.adapters and kind == "weight":
            weights |= live.weights(path)
            adapters[path] = live.adapters
        return live.module

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The block's output.

        Args:
            hidden_states: `[batch, seq_len, hidden_size]`, in the parameters' dtype (any under
                autocast).
            position_embeddings: `(cos, sin)`, each `[batch or 1, seq_len, rotary_dim]`; None:
                from the spec's `rope_theta`, positions counting from 0 in each sequence.
            attention_mask: `[batch or 1, heads or 1, seq_len, seq_len]`, bool (True: visible) or
                added to the scores; it replaces the spec's causality and window.
            cu_seqlens: int32 `[sequences + 1]`: where packed sequences begin, and the end; the
                batch is then 1.
            max_seqlen: the longest of them, which spares a GPU a host synchronisation.

        Returns:
            `[batch, seq_len, hidden_size]`, in hidden_states' dtype.

        Raises:
            TypeError: for a wrong dtype or kind.
            ValueError: for a wrong shape, value or device.
        """
        options: dict[str, Any] = {
            "position_embeddings": position_embeddings, "attention_mask": attention_mask,
            "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen,
        }  # fmt: skip
        weights, adapters = self.weights()
        options |= {
            "training": self.training, "chunk_size": self.chunk_size, "impl": self.impl,
            "ffn_strategy": self.ffn_strategy, "offload_dir": self.offload_dir,
            "adapters": adapters, "context": self.context,
        }  # fmt: skip
        if self.parallel is not None:
            return self.parallel.forward(hidden_states, weights, self.policy, **options)
        return block(hidden_states, weights, self.spec, self.policy, **options)

    def extra_repr(self) -> str:
        """The policy, for `print(model)`."""
        return f"{self.policy}"
