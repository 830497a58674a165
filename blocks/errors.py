"""Words for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(value: object, options: Iterable[object]) -> str:
    """`"; did you mean 'x'?"` for the option nearest to `value` in any case, or nothing."""
    known = {str(option).lower(): option for option in options}
    near = get_close_matches(str(value).lower(), known, n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""
