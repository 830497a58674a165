"""Stand-ins for the attention kernels that need a GPU: they check how they are called, and compute.

Each is called with what its library takes: tensors in the library's layout, every argument of the
operator's schema. The numbers are the explicit path's.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import DEVICE

from backfuse.kernels.cores import abilities, cudnn, flash, prototypes
from backfuse.kernels.reference.explicit_attention import (
    AttentionMask,
    explicit_backward,
    explicit_forward,
)

#: Those that stand in for a library.
CORES = ("flash", "cudnn", "fa3", "fa4")


def bind(operator, args, kwargs):
    """Arguments by name, as the operator's schema has them; each of its type."""
    schema = operator.default._schema
    positional = [a for a in schema.arguments if not a.kwarg_only]
    assert len(args) <= len(positional)
    given = {a.name: value for a, value in zip(positional, args, strict=False)}
    assert not given.keys() & kwargs.keys()
    given |= kwargs
    types = {a.name: str(a.type) for a in schema.arguments}
    assert given.keys() <= types.keys(), given.keys() - types.keys()
    for a in schema.arguments:
        assert a.name in given or a.has_default_value(), f"{a.name} is missing"
    for name, value in given.items():
        kind = types[name].removeprefix("Optional[").removesuffix("]")
        expected = {"Tensor": torch.Tensor, "int": int, "float": float, "bool": bool}[kind]
        # An undefined tensor, which is what None becomes, may stand for any tensor.
        fits = type(value) is expected or (expected is torch.Tensor and value is None)
        assert fits, f"{name} is {value!r}, expected {types[name]}"
    return SimpleNamespace(**{**dict.fromkeys(types), **given})


class Numbers:
    """The explicit path behind FlashAttention's layouts."""

    def __init__(self, q, cu_seqlens, max_q, scale, causal, left, right):
        self.packed = cu_seqlens is not None
        assert q.dim() == (3 if self.packed else 4)
        if self.packed:
            assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
            assert max_q == int(cu_seqlens.diff().max())
        else:
            assert max_q in (None, q.shape[1])
        none = (None, -1)
        window = None
        if left not in none:
            window = left + 1
            assert right == (0 if causal else left)
        else:
            assert right in none
        self.cu_seqlens = cu_seqlens
        self.mask = AttentionMask(causal=causal, window=window, scale=scale)

    def deep(self, *tensors):
        for x in tensors:
            assert x.stride(-1) == 1
        return [x.unsqueeze(0) for x in tensors] if self.packed else tensors

    def forward(self, q, k, v):
        out, lse = explicit_forward(*self.deep(q, k, v), self.mask, cu_seqlens=self.cu_seqlens)
        return (out[0], lse[0]) if self.packed else (out, lse)

    def backward(self, dout, q, k, v, out, lse):
        heads, tokens = (q.shape[1], q.shape[0]) if self.packed else (q.shape[2], q.shape[1])
        expected = (heads, tokens) if self.packed else (q.shape[0], heads, tokens)
        assert lse.shape == expected and lse.dtype == torch.float32
        assert out.shape == q.shape == dout.shape
        dout, q, k, v, out = self.deep(dout, q, k, v, out)
        delta = (out.float() * dout.float()).sum(-1).transpose(1, 2)
        lse = lse.unsqueeze(0) if self.packed else lse
        grads = explicit_backward(dout, q, k, v, lse, self.mask, delta, cu_seqlens=self.cu_seqlens)
        return [g[0] for g in grads[:3]] if self.packed else grads[:3]


def _flash_forward(*args, **kwargs):
    a = bind(torch.ops.aten._flash_attention_forward, args, kwargs)
    assert a.dropout_p == 0.0 and not a.return_debug_mask and a.cum_seq_k is a.cum_seq_q
    assert a.max_k == a.max_q
    numbers = Numbers(
        a.query, a.cum_seq_q, a.max_q, a.scale, a.is_causal, a.window_size_left,
        a.window_size_right,
    )  # fmt: skip
    return *numbers.forward(a.query, a.key, a.value), None, None, None


def _flash_backward(*args, **kwargs):
    a = bind(torch.ops.aten._flash_attention_backward, args, kwargs)
    assert a.dropout_p == 0.0 and a.cum_seq_k is a.cum_seq_q and a.max_k == a.max_q
    assert a.rng_state.dtype == torch.uint64 and a.rng_state.device == a.query.device
    numbers = Numbers(
        a.query, a.cum_seq_q, a.max_q, a.scale, a.is_causal, a.window_size_left,
        a.window_size_right,
    )  # fmt: skip
    return tuple(numbers.backward(a.grad_out, a.query, a.key, a.value, a.out, a.logsumexp))


def _cudnn(a):
    assert a.dropout_p == 0.0 and a.attn_bias is None and a.cum_seq_q is None
    assert a.query.dim() == 4 and a.max_q == a.max_k == a.query.shape[2]
    tokens = a.query.shape[2]
    assert a.key.shape[2] == a.value.shape[2] == tokens
    return Numbers(a.query.transpose(1, 2), None, tokens, a.scale, a.is_causal, -1, -1)


def _cudnn_forward(*args, **kwargs):
    a = bind(torch.ops.aten._cudnn_attention_forward, args, kwargs)
    assert a.compute_log_sumexp and not a.return_debug_mask
    out, lse = _cudnn(a).forward(*(x.transpose(1, 2) for x in (a.query, a.key, a.value)))
    return out.transpose(1, 2), lse.unsqueeze(-1), None, None, a.max_q, a.max_k, None, None, None


def _cudnn_backward(*args, **kwargs):
    a = bind(torch.ops.aten._cudnn_attention_backward, args, kwargs)
    assert a.philox_seed.dtype == a.philox_offset.dtype == torch.int64
    assert a.logsumexp.dim() == 4 and a.logsumexp.shape[3] == 1
    tensors = (x.transpose(1, 2) for x in (a.grad_out, a.query, a.key, a.value, a.out))
    grads = _cudnn(a).backward(*tensors, a.logsumexp.squeeze(-1))
    return tuple(g.transpose(1, 2) for g in grads)


def _fa3_forward(*args):
    """`flash_attn_3::fwd`, whose arguments are all by position."""
    assert len(args) == 34
    q, k, v = args[:3]
    (cu_q, cu_k), (max_q, max_k), scale, causal, left, right = (
        args[7:9], args[12:14], *args[23:27],
    )  # fmt: skip
    assert cu_q is cu_k and max_q == max_k and args[28] == 0.0  # no softcap
    others = {*range(3, 7), 9, 10, 11, *range(14, 23), 30, 32}
    assert all(args[i] is None for i in others)
    return *Numbers(q, cu_q, max_q, scale, causal, left, right).forward(q, k, v), None, None


def _fa3_backward(*args):
    """`flash_attn_3::bwd`, which writes the gradients."""
    assert len(args) == 22
    dout, q, k, v, out, lse = args[:6]
    cu_q, cu_k, _, _, max_q, max_k, scale, causal, left, right, softcap, deterministic = args[9:21]
    assert cu_q is cu_k and max_q == max_k and softcap == 0.0 and deterministic is True
    assert left == -1 or left >= 0  # an integer in any case
    grads = Numbers(q, cu_q, max_q, scale, causal, left, right).backward(dout, q, k, v, out, lse)
    for target, grad in zip(args[6:9], grads, strict=True):
        target.copy_(grad)


def _fa4_forward(
    q, k, v, *, softmax_scale, causal, window_size_left, window_size_right, return_lse,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, seqused_k=None,
    page_table=None, num_splits=1, out=None,
):  # fmt: skip
    assert return_lse and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    assert seqused_k is page_table is out is None
    assert window_size_left is None or window_size_left >= 0  # -1 would mean a window
    numbers = Numbers(
        q, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size_left, window_size_right
    )
    return numbers.forward(q, k, v)


def _fa4_backward(
    q, k, v, out, dout, lse, *, softmax_scale, causal, window_size_left, window_size_right,
    cu_seqlens_q, cu_seqlens_k, deterministic,
):  # fmt: skip
    assert cu_seqlens_q is cu_seqlens_k and deterministic is True
    assert window_size_left is None or window_size_left >= 0
    longest = None if cu_seqlens_q is None else int(cu_seqlens_q.diff().max())
    numbers = Numbers(
        q, cu_seqlens_q, longest, softmax_scale, causal, window_size_left, window_size_right
    )
    return numbers.backward(dout, q, k, v, out, lse)


def install(monkeypatch, *cores):
    """Put these stand-ins in their libraries' places, as if they ran on `conftest.DEVICE`.

    The GPU is a Hopper. What `cores` leaves out is as it is here.
    """
    found = torch.device(DEVICE)
    monkeypatch.setattr(abilities, "capability", lambda device: (9, 0))
    for core in cores:
        able = replace(abilities.ABILITIES[core], device=found.type)
        monkeypatch.setitem(abilities.ABILITIES, core, able)
    if "flash" in cores:
        operators = SimpleNamespace(
            _flash_attention_forward=_flash_forward, _flash_attention_backward=_flash_backward
        )
        monkeypatch.setattr(flash, "aten", operators)
    if "cudnn" in cores:
        operators = SimpleNamespace(
            _cudnn_attention_forward=_cudnn_forward, _cudnn_attention_backward=_cudnn_backward
        )
        monkeypatch.setattr(cudnn, "aten", operators)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    if "fa3" in cores:
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("stand-in"))
        operators = torch.ops.flash_attn_3
        monkeypatch.setattr(operators, "fwd", _fa3_forward, raising=False)
        monkeypatch.setattr(operators, "bwd", _fa3_backward, raising=False)
        for name in ("_FA3_CUDA_FWD", "_FA3_CUDA_BWD"):
            monkeypatch.setattr(f"torch.nn.attention._fa3.{name}", None, raising=False)
    if "fa4" in cores:
        interface = ModuleType("stand-in")
        interface._flash_attn_fwd, interface._flash_attn_bwd = _fa4_forward, _fa4_backward
        packages = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
        for name in packages:
            monkeypatch.setitem(sys.modules, name, interface)
        monkeypatch.setattr("torch.nn.attention._fa4._FA4_MODULE_PATH", None, raising=False)
    forget()
    for prototype in (prototypes.FA3, prototypes.FA4):
        if prototype.name in cores and prototype.missing is not None:
            older = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
            assert older, prototype.missing
            pytest.skip(f"{prototype.name} {prototype.missing}")


def forget():
    """Look anew for FlashAttention 3 and 4."""
    for prototype in (prototypes.FA3, prototypes.FA4):
        prototype.__dict__.pop("missing", None)
    module = sys.modules.get("torch.nn.attention._fa4")
    loader = getattr(module, "_fa4_import_module", None)
    getattr(loader, "cache_clear", lambda: None)()
