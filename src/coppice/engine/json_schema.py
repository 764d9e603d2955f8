"""What a JSON schema must be before it is compiled: small, shallow, supported, satisfiable.

The compiler (llguidance) refuses what it does not know, but it passes over unknown keywords
and lets options in a schema loosen it, and it cannot see that a recursive schema never
ends. Those are refused here, by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from coppice.errors import GrammarError

MAX_BYTES = 64 << 10
MAX_DEPTH = 32
MAX_MULTIPLE_OF = 10_000
MAX_VISITS = 500_000

_ONE = {"additionalItems", "additionalProperties", "items"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_MAPS = {"$defs", "definitions", "patternProperties", "properties"}
_PLAIN = {
    *("$anchor", "$id", "$ref", "$schema", "const", "enum", "exclusiveMaximum"),
    *("exclusiveMinimum", "format", "maximum", "maxItems", "maxLength", "maxProperties"),
    *("minimum", "minItems", "minLength", "minProperties", "multipleOf", "pattern"),
    *("required", "type"),
}
_ANNOTATIONS = {
    *("$comment", "contentEncoding", "contentMediaType", "default", "deprecated"),
    *("description", "discriminator", "example", "examples", "readOnly", "title"),
    "writeOnly",
}
SUPPORTED = frozenset(_ONE | _LISTS | _MAPS | _PLAIN | _ANNOTATIONS)
"""Keywords taken; annotations have no effect on the output, as the standard says."""


def parse_schema(text: str, param: str = "response_format") -> Any:
    """Parse and check a JSON schema.

    Args:
        text: the schema as JSON.
        param: the request field to blame.

    Returns:
        The schema, a dictionary or a boolean.

    Raises:
        GrammarError: not JSON, over 64 KiB, deeper than 32, an unsupported keyword (named),
            or no finite value can satisfy it.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise _error("The JSON schema is larger than 64 KiB; make it smaller.", param)
    try:
        schema = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise _error(f"The JSON schema is nested deeper than {MAX_DEPTH}.", param) from None
    except ValueError as error:
        raise _error(f"The JSON schema is not valid JSON: {error}.", param) from None
    check_schema(schema, param)
    return schema


def check_schema(schema: Any, param: str = "response_format") -> None:
    """Check a parsed schema; see `parse_schema` for what is refused."""
    _check_depth(schema, param)
    for path, node in _walk(schema, "#"):
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise _error(f"{path} of the JSON schema must be an object or a boolean.", param)
        _check_keywords(node, path, param)
    if not _Endings(schema, param).holds():
        raise _error(
            "The JSON schema is impossible: no finite value satisfies it; give the recursion "
            "an end, for example with minItems 0 or an optional property.",
            param,
        )


def _check_depth(schema: Any, param: str) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        parents, level = level, []
        for value in parents:
            if isinstance(value, dict):
                level.extend(value.values())
            elif isinstance(value, list):
                level.extend(value)
    raise _error(f"The JSON schema is nested deeper than {MAX_DEPTH}; flatten it.", param)


def _check_keywords(node: dict[str, Any], path: str, param: str) -> None:
    for key, value in node.items():
        extension = key.startswith("x-") and key != "x-guidance"
        if key not in SUPPORTED and not extension:
            raise _error(
                f"The JSON schema keyword {key!r} (at {path}) is not supported; remove it.", param
            )
        if (key in _LISTS and not isinstance(value, list)) or (
            key in _MAPS and not isinstance(value, dict)
        ):
            raise _error(f"{key!r} at {path} of the JSON schema has the wrong type.", param)
    ref = node.get("$ref", "#")
    if not isinstance(ref, str) or not ref.startswith("#"):
        raise _error(f"$ref at {path} must point inside the schema ('#/...').", param)
    multiple = node.get("multipleOf", 1)
    if not isinstance(multiple, int | float) or not 0 < multiple <= MAX_MULTIPLE_OF:
        raise _error(f"multipleOf at {path} must be above 0 and at most {MAX_MULTIPLE_OF}.", param)


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every subschema with its path; values of ``const``, ``enum``, ``default`` are not."""
    yield path, node
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            for name, child in value.items():
                yield from _walk(child, f"{path}/{key}/{name}")
        elif (key in _LISTS or key == "items") and isinstance(value, list):
            for i, child in enumerate(value):
                yield from _walk(child, f"{path}/{key}/{i}")
        elif key in _ONE:
            yield from _walk(value, f"{path}/{key}")


class _Endings:
    """Whether a schema has a finite value: the least fixed point over its references.

    Only recursion is looked at; contradictory ranges and types are the compiler's to find.
    """

    def __init__(self, root: Any, param: str) -> None:
        self._root = root
        self._param = param
        self._ending: set[str] = set()
        self._visits = 0

    def holds(self) -> bool:
        refs = {node["$ref"] for _, node in _walk(self._root, "#") if _has_ref(node)}
        targets = {ref: self._resolve(ref) for ref in refs}
        changed = True
        while changed:
            found = {r for r in refs - self._ending if self._ends(targets[r])}
            self._ending |= found
            changed = bool(found)
        return self._ends(self._root)

    def _resolve(self, ref: str) -> Any:
        node = self._root
        for part in unquote(ref[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                return True  # the compiler reports a pointer to nowhere
        return node

    def _ends(self, node: Any) -> bool:
        self._visits += 1
        if self._visits > MAX_VISITS:
            raise _error("The JSON schema has too many references; simplify it.", self._param)
        if not isinstance(node, dict):
            return node is not False
        if _has_ref(node) and node["$ref"] not in self._ending:
            return False
        if "const" in node or "enum" in node:
            return True
        if not all(self._ends(s) for s in node.get("allOf", ())):
            return False
        for key in ("anyOf", "oneOf"):
            if key in node and not any(self._ends(s) for s in node[key]):
                return False
        kinds = node.get("type", "any")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return any(self._kind_ends(kind, node) for kind in kinds)

    def _kind_ends(self, kind: Any, node: dict[str, Any]) -> bool:
        if kind == "object":
            properties, rest = node.get("properties", {}), node.get("additionalProperties", True)
            required = node.get("required", ())
            return not isinstance(required, list) or all(
                self._ends(properties.get(name, rest) if isinstance(name, str) else True)
                for name in required
            )
        if kind == "array":
            need = node.get("minItems", 0)
            need = need if isinstance(need, int) else 0
            items = node.get("items", True)
            prefix = items if isinstance(items, list) else node.get("prefixItems", [])
            rest = node.get("additionalItems", True) if isinstance(items, list) else items
            return all(self._ends(s) for s in prefix[:need]) and (
                need <= len(prefix) or self._ends(rest)
            )
        return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _has_ref(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("$ref"), str)


def _error(message: str, param: str) -> GrammarError:
    return GrammarError(message, param=param)
