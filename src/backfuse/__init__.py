"""Transformer blocks that choose, tensor by tensor, what to keep for the backward pass."""

from backfuse.blocks.adapters.patch import patch, unpatch
from backfuse.blocks.adapters.report import PatchReport
from backfuse.blocks.block import TransformerBlock
from backfuse.blocks.flash_attention import flash_attention
from backfuse.blocks.flops import Flops, block_flops
from backfuse.blocks.function import attention, ffn
from backfuse.blocks.lora import LoRA, adapter_parameters
from backfuse.blocks.loss import linear_cross_entropy
from backfuse.blocks.memory import host_bytes, kept_bytes
from backfuse.blocks.ops import SAVE_OPS
from backfuse.blocks.parallel import parallelize
from backfuse.blocks.planner.apply import apply
from backfuse.blocks.planner.make import plan
from backfuse.blocks.planner.plan import Plan
from backfuse.blocks.planner.ranks import plan_on_all_ranks
from backfuse.blocks.planner.step import ModelSpec
from backfuse.blocks.policy import NAMED_POLICIES, Policy
from backfuse.blocks.spec import BlockSpec
from backfuse.blocks.stack import BlockStack
from backfuse.kernels.reference.rope import rope_cos_sin

__version__ = "0.1.0"

__all__ = [
    "NAMED_POLICIES",
    "SAVE_OPS",
    "BlockSpec",
    "BlockStack",
    "Flops",
    "LoRA",
    "ModelSpec",
    "PatchReport",
    "Plan",
    "Policy",
    "TransformerBlock",
    "__version__",
    "adapter_parameters",
    "apply",
    "attention",
    "block_flops",
    "ffn",
    "flash_attention",
    "host_bytes",
    "kept_bytes",
    "linear_cross_entropy",
    "parallelize",
    "patch",
    "plan",
    "plan_on_all_ranks",
    "rope_cos_sin",
    "unpatch",
]
