"""A whole Hugging Face model, as it is and patched: gradients of all weights, or of LoRA's.

    model   LlamaForCausalLM on random bytes
    lora    the same with peft's LoRA on all projections, everything else frozen

Peers are the model's own ways to spare memory: activation checkpointing as transformers does it,
and torch.compile. All run on the very same weights.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import backfuse

from .data import VOCABULARY
from .own import own_name
from .plain import PlainRMSNorm, is_llama
from .problem import Case, Contender, Problem, Run
from .ways import Way

#: Rank of the adapters.
RANK = 16


def needs_llama(case: Case) -> str | None:
    """Why a shape is no model here."""
    return None if is_llama(case.spec) else f"builds Llama models; {case.shape} is none"


def loss_of(model: Any) -> Run:
    """Loss from input ids and labels, both `[B, T]`."""

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=inputs, labels=labels, use_cache=False).loss

    return loss


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _build(case: Case, adapters: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = case.spec
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps,
        num_hidden_layers=case.layers,
        max_position_embeddings=case.seq_len,
        attn_implementation="sdpa",
    )
    model: nn.Module = LlamaForCausalLM(config)
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zeros would make the gradients of A zeros
                nn.init.normal_(parameter, std=0.02)
    if case.torch_dtype == torch.float64:
        model = _precise(model, torch.float64)
    return model.to(**case.factory).train()


def _precise(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same in a higher dtype. Hugging Face's norms compute in fp32, whatever theirs."""
    exact = copy.deepcopy(model).to(dtype)
    for path, module in list(exact.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = PlainRMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            parent, _, name = path.rpartition(".")
            exact.get_submodule(parent).add_module(name, norm)
    return exact


def _apply(way: Way, model: nn.Module) -> Run:
    return way(loss_of(model))


def problem(case: Case, adapters: bool = False) -> Problem:
    """The model's loss on random bytes."""
    shape = (case.batch_size, case.seq_len)
    inputs = {
        name: torch.randint(VOCABULARY, shape, device=case.device) for name in ("inputs", "labels")
    }
    full = 4.0 * case.batch_size * case.seq_len**2 * case.spec.q_size
    model = _build(case, adapters)
    return Problem(
        case, model, inputs, type(model).__name__, _precise, _apply,
        attention=case.layers * full / 2,
    )  # fmt: skip


lora = partial(problem, adapters=True)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checkpointing(problem: Problem, policy: str) -> Contender:
    """transformers' own: every layer replayed as a whole."""
    model: Any = twin(problem.module)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.enable_input_require_grads()  # else nothing is checkpointed where all weights are frozen
    return Contender("hf-checkpointing", loss_of(model), _trainable(model))


def patched(problem: Problem, policy: str) -> Contender:
    """`backfuse.patch`."""
    model = twin(problem.module)
    backfuse.patch(model, policy)
    return Contender(own_name(problem.case), loss_of(model), _trainable(model), policy)
