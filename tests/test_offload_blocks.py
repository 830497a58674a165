"""Policies that offload: the bits of `keep`, the bytes that were predicted, nothing left over."""

import json
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, held_bytes, make_block, make_input, results, same_bits

from backfuse import BlockStack, host_bytes, kept_bytes, rope_cos_sin
from backfuse.blocks import run
from backfuse.blocks.offload import line
from backfuse.blocks.policy import ACTIVATION_NAMES

POLICIES = [
    "offload",
    dict.fromkeys(ACTIVATION_NAMES, "offload"),
    {"qkv": "offload", "preact": "offload", "mid": "recompute", "attn_out": "recompute"},
    {"x": "offload", "preact": "fp8"},
]
LOSSLESS = POLICIES[:3]


@pytest.fixture
def parcels():
    """Those of this test's device and place: none before, none after."""
    known = line(torch.device("cpu"), None).parcels
    assert not known
    yield known
    assert not known


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("files", [False, True])
def test_the_bits_of_keep(family, dtype, files, parcels, tmp_path):
    spec = FAMILIES[family]
    x, grad = make_input(spec, dtype=dtype)
    block = make_block(spec, dtype=dtype)
    expected = results(block, x, grad)
    block.offload_dir = tmp_path if files else None
    for policy in LOSSLESS:
        block.policy = policy
        assert same_bits(results(block, x, grad), expected), policy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_to_the_byte(family, policy, parcels):
    spec = FAMILIES[family]
    x, _ = make_input(spec, seq_len=33)
    block = make_block(spec, policy)
    angles = None
    if spec.rope is not None:
        angles = rope_cos_sin(torch.arange(33)[None], spec.rotary_dim, layout=spec.rope)
    sizes = {"batch_size": 2, "seq_len": 33}
    held, y = held_bytes(
        lambda: block(x, position_embeddings=angles), exclude=[*block.parameters(), *(angles or ())]
    )
    assert held == sum(kept_bytes(spec, policy, **sizes).values())
    [parcel] = parcels
    moved = sum(like.numel() * like.element_size() for like in parcel.likes.values())
    assert moved == sum(host_bytes(spec, policy, **sizes).values()) > 0
    both = kept_bytes(spec, policy, **sizes).keys() | host_bytes(spec, policy, **sizes).keys()
    policy = {name: "keep" if a == "offload" else a for name, a in vars(block.policy).items()
              if name in ACTIVATION_NAMES}  # fmt: skip
    assert both == kept_bytes(spec, policy, **sizes).keys()
    del y, parcel


@pytest.mark.parametrize("segments", [None, 2, ((2, 1), 3)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stacks_and_segments(family, segments, parcels):
    spec = FAMILIES[family]
    torch.manual_seed(0)
    stack = BlockStack(spec, 6, "keep", chunk_size=64)
    x, grad = make_input(spec)
    expected = results(stack, x, grad)
    for policy in LOSSLESS:
        stack.set_policy(policy, segments)
        assert same_bits(results(stack, x, grad), expected), policy
    # only the first layers of segments have an x to offload
    stack.set_policy("offload", segments)
    y = stack(x)
    moved = {None: 6, 2: 3, ((2, 1), 3): 2}[segments]
    assert len(parcels) == moved
    assert sum(name.endswith("0.x") for parcel in parcels for name in parcel.likes) == moved
    del y


def test_gone_right_after_backward(parcels):
    """Not when the loss goes: the next forward pass would find twice as much."""
    spec = FAMILIES["llama"]
    stack = BlockStack(spec, 5, "offload")
    loss = stack(make_input(spec)[0]).sum()
    assert len(parcels) == 5
    loss.backward()
    assert not parcels
    with torch.no_grad():
        y = stack(make_input(spec)[0])
    assert not parcels and y is not None


def test_a_retained_graph(parcels):
    spec = FAMILIES["llama"]
    stack = BlockStack(spec, 5, "offload")
    x, grad = make_input(spec)
    y = stack(x)
    first = torch.autograd.grad(y, [x, *stack.parameters()], grad, retain_graph=True)
    assert len(parcels) == 5
    second = torch.autograd.grad(y, [x, *stack.parameters()], grad)
    assert same_bits(first, second) and not parcels


def test_micro_batches_in_flight(parcels):
    spec = FAMILIES["llama"]
    stack = BlockStack(spec, 4, "keep")
    batches = [make_input(spec, seq_len=20 + 10 * n) for n in range(3)]

    def step():
        stack.zero_grad()
        outs = [stack(x) for x, _ in batches]
        for y, (_, grad) in zip(outs, batches, strict=True):
            y.backward(grad)
        return [p.grad for p in stack.parameters()]

    expected = step()
    stack.set_policy("offload")
    assert same_bits(step(), expected)


def test_under_somebodys_hooks(parcels):
    spec = FAMILIES["llama"]
    block = make_block(spec)
    x, grad = make_input(spec)
    expected = results(block, x, grad)
    block.policy = "offload"
    with torch.autograd.graph.save_on_cpu():
        found = results(block, x, grad)
    assert same_bits(found, expected)
    packed = []  # hooks that let go of what they are given
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.clone()) or len(packed) - 1, lambda index: packed[index]
    ):
        found = results(block, x, grad)
    assert same_bits(found, expected)


def test_a_failed_pass_leaves_nothing(parcels, monkeypatch):
    spec = FAMILIES["llama"]
    stack = BlockStack(spec, 5, "offload")
    x, grad = make_input(spec)
    calls = []

    class Half(run.FFNHalf):
        def forward(self, *args):
            calls.append(1)
            if len(calls) == 4:
                raise ZeroDivisionError("on purpose")
            return super().forward(*args)

        def backward(self, *args):
            calls.append(1)
            if len(calls) == 8:
                raise ZeroDivisionError("on purpose")
            return super().backward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "FFNHalf", Half)
        with pytest.raises(ZeroDivisionError):
            stack(x)
        assert not parcels
        calls[:] = [1] * 9
        y = stack(x)
        calls.clear()
        calls[:] = [1] * 5
        with pytest.raises(ZeroDivisionError):
            y.backward(grad)
    del y
    assert not parcels
    stack(x).backward(grad)


def test_a_change_in_place(parcels):
    spec = FAMILIES["llama"]
    block = make_block(spec, "offload")
    x, grad = make_input(spec, requires_grad=False)
    y = block(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="the block: 0.x, which it kept.* changed in place"):
        y.backward(grad)
    del y


TRAIN = """
import json, resource, sys
import torch
from backfuse import BlockSpec, BlockStack, kept_bytes, host_bytes

folder, policy, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
spec, layers, sizes = BlockSpec(64, 64, 2), 40, {"batch_size": 256, "seq_len": 128}
stack = BlockStack(spec, layers, policy, offload_dir=folder)
optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
kept = kept_bytes(spec, policy, **sizes)
moved = host_bytes(spec, policy, **sizes)
x = torch.randn(sizes["batch_size"], sizes["seq_len"], 64)
stack(x[:2]).square().mean().backward()  # whatever starts up with the first call
if room:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
losses = []
for _ in range(2):
    optimizer.zero_grad()
    loss = stack(x).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(json.dumps([losses, layers * sum(kept.values()), layers * sum(moved.values())]))
"""


def test_more_than_memory_holds(tmp_path):
    """Files let a stack train in a quarter of the memory that its kept tensors take."""
    room = 160 * 2**20

    def train(policy, room):
        command = [sys.executable, "-c", TRAIN, str(tmp_path), policy, str(room)]
        # what is freed is to be free: glibc would keep it in heaps
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    free, tight = train("lean", 0), train("offload", room)
    assert tight.returncode == 0, tight.stderr
    losses, _, moved = json.loads(tight.stdout)
    assert moved >= 4 * room and losses == json.loads(free.stdout)[0]
    starved = train("lean", room)  # the limit is one
    assert starved.returncode != 0 and "memory" in starved.stderr.lower()


@pytest.mark.parametrize(
    "folder, kind, message",
    [(3, TypeError, "offload_dir is 3"), ("/nowhere/at/all", ValueError, "expected a folder")],
)
def test_a_bad_folder(folder, kind, message):
    with pytest.raises(kind, match=message):
        BlockStack(FAMILIES["llama"], 2, offload_dir=folder)
