"""The one function that builds a Jinja environment: sandboxed, metered, few names.

On top of Jinja's immutable sandbox: attributes, filters and globals are allow-lists; the
syntax tree is rewritten so that loop turns, concatenations, literals and comparisons pay
the meter; operators that can blow a value up check the result's size before computing it.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from coppice.errors import TemplateError
from coppice.models.template_guards import (
    before_method,
    check_format,
    check_operands,
    metered_filter,
    metered_test,
    tojson,
)
from coppice.models.template_meter import MAX_CALL_DEPTH, meter
from coppice.models.template_syntax import PAYMENTS, GenerationBlock, Metering, pay_made

_STR = (
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal "
    "isdigit isidentifier islower isnumeric isspace istitle isupper join lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper"
)
_LOOP = (
    "index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle changed"
)
_ALLOWED_ATTRIBUTES: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(_STR.split())),
    (dict, frozenset(["get", "items", "keys", "values"])),
    (list, frozenset(["count", "index"])),
    (tuple, frozenset(["count", "index"])),
    (LoopContext, frozenset(_LOOP.split())),
)
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float format indent int items join "
    "last length list lower map max min reject rejectattr replace reverse round safe select "
    "selectattr sort string sum title trim unique upper wordcount"
)
_OPERATORS = frozenset(["+", "-", "*", "/", "//", "%", "**"])
_WIDE_DATE = re.compile(r"%[-_0^#]*\d")
_CALL_CHARS = 256  # a call costs several times as much as a loop turn
_MAX_DATE_FORMAT = 256

Now = Callable[[], datetime.datetime]


def build_environment(now: Now = datetime.datetime.now) -> jinja2.Environment:
    """The environment chat templates run in. A `metered` block must surround its use.

    Matches what ``transformers`` gives a template (block trimming, loop controls,
    ``generation`` blocks, plain-JSON ``tojson``, ``raise_exception``, ``strftime_now``,
    ``namespace``, ``dict``, ``range``), less Jinja's ``lipsum``, ``cycler`` and ``joiner``.

    Args:
        now: the clock behind ``strftime_now``.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, jinja2.ext.loopcontrols],
        finalize=pay_made,
        optimized=False,  # constant folding would run filters while compiling
        cache_size=0,
    )
    kept = {name: metered_filter(name, environment.filters[name]) for name in _FILTERS.split()}
    environment.filters = {**kept, **PAYMENTS, "tojson": tojson}
    tests: dict[str, Any] = environment.tests
    environment.tests = {name: metered_test(test) for name, test in tests.items()}
    environment.globals = {
        "range": environment.globals["range"],
        "dict": _make_dict,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": functools.partial(_strftime_now, now),
    }
    return environment


class _Environment(ImmutableSandboxedEnvironment):
    """Immutable sandbox whose calls, operators and loops pay the current meter."""

    intercepted_binops = _OPERATORS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all(
            (
                nodes.Include,
                nodes.Import,
                nodes.FromImport,
                nodes.Extends,
                nodes.EvalContextModifier,
            )
        ):
            raise TemplateError(
                f"The chat template uses {type(node).__name__.lower()!r}, which is not allowed; "
                "write the template in one piece."
            )
        rewritten: nodes.Template = Metering().visit(tree)
        return rewritten

    def getattr(self, obj: Any, attribute: str) -> Any:
        meter().pay()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        meter().pay()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, Namespace):
            return True
        return any(isinstance(obj, kind) and attr in names for kind, names in _ALLOWED_ATTRIBUTES)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None or value.__name__ != "format":
            return None
        template = str(value.__self__)

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(template, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        spent = meter()
        spent.pay(_CALL_CHARS)
        if isinstance(__obj, Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            spent.check([*args, *kwargs.values()])
        args = before_method(__obj, args, kwargs)
        spent.depth += 1
        if spent.depth > MAX_CALL_DEPTH:
            raise TemplateError(
                f"The chat template calls itself more than {MAX_CALL_DEPTH} levels deep; use a "
                "template without endless recursion."
            )
        try:
            return spent.check(super().call(__context, __obj, *args, **kwargs))
        finally:
            spent.depth -= 1

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operands(operator, left, right)
        return meter().check(super().call_binop(context, operator, left, right))


class _Namespace(Namespace):
    """``namespace()`` without underscore names, and opaque when written out."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        meter().check(list(values.values()))
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"The chat template stores the name {name!r}; rename it.")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise TemplateError(f"The chat template refused the messages: {str(message)[:500]}")


def _strftime_now(now: Now, template: str) -> str:
    if len(template) > _MAX_DATE_FORMAT or _WIDE_DATE.search(template):
        raise TemplateError("The chat template asks for a date in a format beyond the limit.")
    return now().strftime(template)
