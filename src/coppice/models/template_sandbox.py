"""The one function that builds a Jinja environment: sandboxed, metered, few names.

On top of Jinja's immutable sandbox: attributes, filters and globals are allow-lists; the
syntax tree is rewritten so that loop turns, concatenations, literals and comparisons pay
the meter; operators that can blow a value up check the result's size before computing it.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import string
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from coppice.errors import TemplateError
from coppice.models.template_meter import MAX_CALL_DEPTH, MAX_INT_BITS, meter

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
# These look at every character once per character of their argument, in the worst case.
_QUADRATIC = frozenset(["strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"])
_WIDE_FIELD = re.compile(r"\d{4,}|\*")
_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d{4,}|\d*\.(?:\*|\d{4,}))")
_WIDE_DATE = re.compile(r"%[-_0^#]*\d")
_MAX_INDENT = 64
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
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        finalize=_pay_made,
        optimized=False,  # constant folding would run filters while compiling
        cache_size=0,
    )
    kept = {name: _metered_filter(name, environment.filters[name]) for name in _FILTERS.split()}
    environment.filters = {**kept, **_PAYMENTS, "tojson": _tojson}
    tests: dict[str, Any] = environment.tests
    environment.tests = {name: _metered_test(test) for name, test in tests.items()}
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
        rewritten: nodes.Template = _Metering().visit(tree)
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
            _check_format(template, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        spent = meter()
        spent.pay(_CALL_CHARS)
        if isinstance(__obj, Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            spent.check([*args, *kwargs.values()])
        args = _before_method(__obj, args, kwargs)
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
        _check_operands(operator, left, right)
        return meter().check(super().call_binop(context, operator, left, right))


class _Metering(NodeTransformer):
    """Adds payments to a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        turn = _paid(_TURN, [nodes.Const(text)], node)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        if node.test is not None:  # a filtered loop turns without entering its body
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _paid(_CONCAT, node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _read(node.expr)
        for operand in node.ops:
            operand.expr = _read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):  # slices bypass Environment.getitem
            node.node = _read(node.node)
        return node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # a tuple that is assigned to
            return node
        return _paid(_MAKE, [node], node)

    visit_List = visit_Tuple = visit_Dict = _made


def _paid(name: str, args: list[Any], at: nodes.Node) -> nodes.Filter:
    """A payment, spelled as a filter because compiled templates call filters directly."""
    return nodes.Filter(args[0], name, args[1:], [], None, None, lineno=at.lineno)


def _read(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _paid(_READ, [node], node)


def _pay_turn(chars: int) -> bool:
    meter().pay(chars)
    return True


def _pay_made(value: Any) -> Any:
    return meter().check(value)


def _pay_read(value: Any) -> Any:
    return meter().weigh(value)


def _pay_concat(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    meter().require_size(sum(map(len, texts)))
    joined: str = meter().check("".join(texts))
    return joined


# No template can spell these names.
_TURN, _MAKE, _READ, _CONCAT = " turn", " make", " read", " concat"
_PAYMENTS: dict[str, Callable[..., Any]] = {
    _TURN: _pay_turn,
    _MAKE: _pay_made,
    _READ: _pay_read,
    _CONCAT: _pay_concat,
}


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads a class attribute

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_pass_through"), [], [], body)
        return block.set_lineno(lineno)

    def _pass_through(self, caller: Callable[[], str]) -> str:
        return caller()


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


def _tojson(
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


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
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


def _metered_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """The test, paying for what it looks at."""

    @functools.wraps(function)
    def tested(*args: Any, **kwargs: Any) -> Any:
        meter().pay(sum(len(arg) for arg in args if isinstance(arg, (str, list, tuple))))
        return function(*args, **kwargs)

    return tested


def _before_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
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


def _check_format(template: str, values: list[Any]) -> None:
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


def _check_operands(operator: str, left: Any, right: Any) -> None:
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
        if left.bit_length() * abs(right) > MAX_INT_BITS:
            raise TemplateError("The chat template computes with numbers beyond the limit.")
