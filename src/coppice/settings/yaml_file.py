"""Reading the settings file: plain YAML, no tags that build objects, no repeated keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from coppice.errors import ConfigError

MAX_FILE_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key written twice is an error, not the last wins."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is not text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is written twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse ``path`` into ``{section: {key: value}}``; an empty file is no settings.

    Raises:
        ConfigError: the file cannot be read, is over 1 MiB, or is not a YAML mapping.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes; check the path.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the settings file {path}: {error}.") from error
    try:
        # The loader is a SafeLoader: tags that would build objects are refused.
        sections = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise ConfigError(f"{path} is not valid YAML: {reason}.") from error
    if sections is None:
        return {}
    if not isinstance(sections, dict):
        raise ConfigError(f"{path} must hold sections such as 'engine:' with keys below them.")
    return sections
