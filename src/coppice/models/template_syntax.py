"""The syntax of chat templates: payments written into the tree, and ``generation`` blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from coppice.models.template_meter import meter


class Metering(NodeTransformer):
    """Adds payments to a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        """Pay per turn, also where a filter skips the body."""
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        turn = _paid(_TURN, [nodes.Const(text)], node)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        if node.test is not None:  # a filtered loop turns without entering its body
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """``a ~ b`` joins with the size checked."""
        self.generic_visit(node)
        return _paid(_CONCAT, node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """Pay for what is compared."""
        self.generic_visit(node)
        node.expr = _read(node.expr)
        for operand in node.ops:
            operand.expr = _read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """Pay for what is sliced."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):  # slices bypass Environment.getitem
            node.node = _read(node.node)
        return node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # a tuple that is assigned to
            return node
        return _paid(_MAKE, [node], node)

    visit_List = _made  # noqa: N815
    visit_Tuple = _made  # noqa: N815
    visit_Dict = _made  # noqa: N815


def _paid(name: str, args: list[Any], at: nodes.Node) -> nodes.Filter:
    """A payment, spelled as a filter because compiled templates call filters directly."""
    return nodes.Filter(args[0], name, args[1:], [], None, None, lineno=at.lineno)


def _read(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _paid(_READ, [node], node)


def _pay_turn(chars: int) -> bool:
    meter().pay(chars)
    return True


def pay_made(value: Any) -> Any:
    """Pay for a value the template made or writes out, by its size."""
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
PAYMENTS: dict[str, Callable[..., Any]] = {
    _TURN: _pay_turn,
    _MAKE: pay_made,
    _READ: _pay_read,
    _CONCAT: _pay_concat,
}


class GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads a class attribute

    def parse(self, parser: Any) -> nodes.Node:
        """Read the block as a call block around its body."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_pass_through"), [], [], body)
        return block.set_lineno(lineno)

    def _pass_through(self, caller: Callable[[], str]) -> str:
        return caller()
