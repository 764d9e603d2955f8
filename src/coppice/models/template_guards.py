"""Filters, tests and string methods of chat templates, paying for what they touch.

Whatever can make much out of little (repeating, padding, joining, replacing, formatting,
powers) is checked by size before it is computed.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Callable
from typing import Any

from jinja2.runtime import Undefined

from coppice.errors import TemplateError
from coppice.models.template_meter import MAX_INT_BITS, meter

# These look at every character once per character of their argument, in the worst case.
_QUADRATIC = frozenset(["strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"])
_WIDE_FIELD = re.compile(r"\d{4,}|\*")
_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d{4,}|\d*\.(?:\*|\d{4,}))")
_MAX_INDENT = 64


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as ``transformers`` writes it: nothing HTML-escaped, ASCII not enforced."""
    spent = meter()
    if indent is not None and (not isinstance(indent, int) or indent > _MAX_INDENT):
        raise TemplateError("The chat template indents JSON beyond the limit.")
    if separators is not None:
        for separator in separators:
            spent.require_size(len(separator) * 1000)
    spent.check(value)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    checked: str = spent.check(text)
    return checked


def metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, paying for its input and its result; blow-ups are refused beforehand."""
    position = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        spent = meter()
        before, value, rest = args[:position], args[position], args[position + 1 :]
        spent.weigh(value)
        if name == "join":
            separator = rest[0] if rest else kwargs.get("d", "")
            value = _joinable(str(separator), value)
        elif name == "replace" and len(rest) > 1:
            _check_replace(str(value), str(rest[0]), str(rest[1]))
        elif name == "indent":
            _check_indent(str(value), rest[0] if rest else kwargs.get("width", 4))
        elif name == "trim" and rest and isinstance(rest[0], str):
            spent.pay(len(str(value)) * len(rest[0]) // 16)
        elif name == "format":
            _check_percent(str(value), kwargs or rest)
        elif name == "round":
            precision = rest[0] if rest else kwargs.get("precision", 0)
            if not isinstance(precision, int) or abs(precision) > _MAX_INDENT:
                raise TemplateError("The chat template rounds beyond the limit.")
        elif name == "sum":
            spent.check(value if isinstance(value, (list, tuple)) else None)
        return spent.check(function(*before, value, *rest, **kwargs))

    return filtered


def metered_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """The test, paying for what it looks at."""

    @functools.wraps(function)
    def tested(*args: Any, **kwargs: Any) -> Any:
        meter().pay(sum(len(arg) for arg in args if isinstance(arg, (str, list, tuple))))
        return function(*args, **kwargs)

    return tested


def before_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Check a string method that can blow up; may materialise its iterable argument."""
    owner = getattr(method, "__self__", None)
    if not isinstance(owner, str) or not args:
        return args
    spent, name = meter(), method.__name__
    spent.pay(len(owner))
    if name == "join":
        return (_joinable(owner, args[0]), *args[1:])
    if name == "replace" and len(args) > 1:
        _check_replace(owner, str(args[0]), str(args[1]))
    elif name in _QUADRATIC and isinstance(args[0], str):
        spent.pay(len(owner) * len(args[0]) // 16)
    return args


def _joinable(separator: str, value: Any) -> list[Any]:
    """The items as a list whose joined length was found small enough."""
    spent = meter()
    items, size = [], 0
    for item in value:
        if not isinstance(item, (str, int, float, Undefined)):
            spent.check(item)
        size += len(separator) + (len(item) if isinstance(item, str) else 1)
        spent.require_size(size)
        spent.pay()
        items.append(item)
    return items


def _check_replace(text: str, old: str, new: str) -> None:
    grown = len(text) + text.count(old) * max(0, len(new) - len(old))
    meter().require_size(grown)


def _check_indent(text: str, width: Any) -> None:
    step = len(width) if isinstance(width, str) else int(width)
    meter().require_size(len(text) + (text.count("\n") + 1) * max(0, step))


def check_format(template: str, values: list[Any]) -> None:
    """Refuse ``str.format`` with wide fields, or whose fields could write too much."""
    spent = meter()
    fields = 0
    for _, field, spec, _ in string.Formatter().parse(template):
        fields += field is not None
        if spec and (_WIDE_FIELD.search(spec) or "{" in spec):
            raise TemplateError("The chat template formats with a width beyond the limit.")
    spent.require_size(len(template) + fields * spent.expanded(values))


def _check_percent(template: str, values: Any) -> None:
    spent = meter()
    if _PERCENT_FIELD.search(template):
        raise TemplateError("The chat template formats with a width beyond the limit.")
    # A mapping's value may be named many times; other values are used once.
    times = template.count("%") if isinstance(values, dict) else 1
    spent.require_size(len(template) + times * spent.expanded(values))


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be beyond the caps, before computing it."""
    sized = (str, list, tuple)
    if operator == "%" and isinstance(left, str):
        _check_percent(left, right)
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        meter().require_size(len(left) + len(right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, sized) and isinstance(times, int):
                meter().require_size(len(value) * max(0, times))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right)
        if bits > MAX_INT_BITS:
            raise TemplateError("The chat template computes with numbers beyond the limit.")
