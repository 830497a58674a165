"""A plan as JSON: everything it was made from, what it says, and what it will cost.

The costs are in the file for whoever reads it; `Plan.load` computes them again, and refuses a file
that says otherwise.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backfuse.blocks.devices import Device
from backfuse.blocks.lora import LoRA, parse_adapters
from backfuse.blocks.memory import DTYPES
from backfuse.blocks.policy import Policy
from backfuse.blocks.profiled import Factors, ProfiledDevice
from backfuse.blocks.spec import BlockSpec
from backfuse.blocks.stack import Segments

from .byte_sizes import parse_bytes
from .step import ModelSpec

if TYPE_CHECKING:
    from .plan import Plan

#: Changes when an older reader would misread the file.
FORMAT = 2

#: What a plan costs, by the names of its properties.
NUMBERS = ("kept_bytes", "host_bytes", "peak_bytes", "seconds", "overhead")

#: Fields that are JSON as they are.
PLAIN = ("batch_size", "seq_len", "strategy")

BUDGETS = ("budget", "peak_budget", "host_budget")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    known = {_dtype_name(dtype): dtype for dtype in DTYPES}
    if name not in known:
        raise ValueError(f"dtype is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def _tuples(part: Any) -> Segments:
    return tuple(_tuples(inner) for inner in part) if isinstance(part, list) else part


def _device_content(where: Device) -> dict[str, Any]:
    content = {f.name: getattr(where, f.name) for f in fields(Device)}
    content["dtypes"] = [_dtype_name(dtype) for dtype in where.dtypes]
    if isinstance(where, ProfiledDevice):
        content["blocks"] = [{"spec": s.given, "factors": asdict(f)} for s, f in where.blocks]
    return content


def _device(content: Mapping[str, Any]) -> Device:
    given = dict(content)
    given["dtypes"] = tuple(_dtype(name) for name in given["dtypes"])
    if "blocks" not in given:
        return Device(**given)
    given["blocks"] = tuple(
        (BlockSpec(**one["spec"]), Factors(**one["factors"])) for one in given["blocks"]
    )
    return ProfiledDevice(**given)


def write(path: Path, plan: Plan) -> None:
    """Writes the file, or leaves what was there.

    Raises:
        OSError: if it cannot be written.
    """
    content = {
        "format": FORMAT,
        **{name: getattr(plan, name) for name in (*PLAIN, *BUDGETS, *NUMBERS)},
        "dtype": _dtype_name(plan.dtype),
        "allow": list(plan.allow),
        "device": _device_content(plan.device),
        "kinds": [{"spec": spec.given, "requires_grad": wanted} for spec, wanted in plan.kinds],
        "kind_of": plan.kind_of,
        "model": None if plan.model is None else asdict(plan.model),
        "policies": [asdict(policy) for policy in plan.policies],
        "segments": plan.segments,
        "adapters": {name: [asdict(lora) for lora in own] for name, own in plan.adapters},
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fields_of(content: Any) -> dict[str, Any]:
    """The fields of a `Plan`, from what the file says.

    Raises:
        KeyError, TypeError, ValueError: for something missing or wrong.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"the file holds a {type(content).__name__}, expected an object")
    if content["format"] != FORMAT:
        raise ValueError(f"format is {content['format']!r}, expected {FORMAT}")
    kinds = [(BlockSpec(**kind["spec"]), tuple(kind["requires_grad"])) for kind in content["kinds"]]
    if not all(isinstance(k, int) and 0 <= k < len(kinds) for k in content["kind_of"]):
        raise ValueError(f"kind_of is {content['kind_of']}, expected indices of kinds")
    own = [kinds[index] for index in content["kind_of"]]
    budgets = {name: content[name] for name in BUDGETS}
    adapters = content.get("adapters", {})  # what plans without them, of earlier versions, lack
    return {
        **{name: content[name] for name in PLAIN},
        **{n: None if value is None else parse_bytes(n, value) for n, value in budgets.items()},
        "dtype": _dtype(content["dtype"]),
        "allow": tuple(content["allow"]),
        "requires_grad": tuple(wanted for _, wanted in own),
        "device": _device(content["device"]),
        "specs": tuple(spec for spec, _ in own),
        "model": None if content["model"] is None else ModelSpec(**content["model"]),
        "policies": tuple(Policy(**policy) for policy in content["policies"]),
        "segments": tuple(_tuples(part) for part in content["segments"]),
        "adapters": parse_adapters(
            kinds[0][0], {name: [LoRA(**one) for one in own] for name, own in adapters.items()}
        ),
    }


def check_numbers(content: Mapping[str, Any], plan: Plan) -> None:
    """Raise a ValueError unless the file's costs are those of the plan."""
    for name in NUMBERS:
        said, expected = content[name], getattr(plan, name)
        if not math.isclose(said, expected, rel_tol=1e-9, abs_tol=1e-12):
            raise ValueError(f"{name} is {said}, expected {expected}: what the rest of it costs")


def read(path: Path) -> Any:
    """What the file says.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON.
    """
    return json.loads(path.read_text("utf-8"))
