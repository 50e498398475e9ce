"""Strict YAML: only plain data, of bounded size, without duplicate keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_NODES = 300_000
"""Largest number of values in a file with its aliases expanded, since ten lines can expand to a billion values."""


def expanded_size(node: yaml.Node | None, known: dict[int, int] | None = None) -> int:
    """Number of nodes below ``node`` with aliases expanded; the size of each node is computed once and remembered.

    Raises:
        RecursionError: ``node`` is nested too deeply, or contains itself.
    """
    known = {} if known is None else known
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(expanded_size(child, known) for child in flat)
    return known[id(node)]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys (plain YAML silently keeps the last one) and too many aliases."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if expanded_size(node) > MAX_NODES:
            problem = f"its aliases expand to more than {MAX_NODES:,} values; use fewer aliases"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark if node else None)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def load_yaml(content: bytes, path: Path) -> object:
    """Read ``content`` of the file ``path``.

    Raises:
        ValueError: It is not UTF-8, not valid YAML, or more than plain data; the message names file and line.
    """
    try:
        if b"\0" in content:  # UTF-16 without a mark is UTF-8 that no text is
            raise UnicodeError
        text = content.decode()
    except UnicodeError as error:
        raise ValueError(f"{path} is not valid YAML, which is text in UTF-8: save it as UTF-8.") from error
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} is not valid YAML: {error.problem}{line}.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
