"""Words for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(value: object, options: Iterable[object]) -> str:
    """`"; did you mean 'x'?"` for the option nearest to `value`, or nothing."""
    near = get_close_matches(str(value), [str(option) for option in options], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
