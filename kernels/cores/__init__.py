"""Attention cores: who computes softmax attention from q, k and v, and its gradient from O and LSE.

Each is a module or an object with the same three functions, `attention_forward`,
`attention_backward` and `needs_delta` (see `reference/attention.py`), and keeps the same: O, and
LSE in fp32, `[batch, heads, tokens]`.

| core | whose | gradient of the same bits each time |
|---|---|---|
| `triton` | ours (`attention_core.py`) | always |
| `reference` | ours, in PyTorch (`reference/attention.py`) | always |
| `cpu` | PyTorch's for CPUs (`reference/cpu_attention.py`) | always |
| `flash` | PyTorch's FlashAttention 2 (`flash.py`) | under `use_deterministic_algorithms` |
| `cudnn` | cuDNN's, through PyTorch (`cudnn.py`) | never |
| `fa3`, `fa4` | FlashAttention 3 and 4, through PyTorch (`prototypes.py`) | asked for each time |

`abilities.py` says what each can do, `choose.py` which one runs. Those of PyTorch, of cuDNN and of
FlashAttention have been called with stand-ins only: they need a GPU.
"""
