"""The list of `rl_accel.*` settings, made from the dataclasses that hold them: `python -m rl_accel.train --help`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from rl_accel.config import RunConfig
from rl_accel.feature import features

WIDTH = 118


def flags() -> Iterator[tuple[str, str, str]]:
    """Return name, default and meaning of every setting."""
    yield from _of(RunConfig, "rl_accel")
    for name, feature in features().items():
        yield from _of(feature.config, f"rl_accel.{name}")


def page() -> str:
    """Return the list as text for a terminal."""
    parts = []
    for name, default, meaning in flags():
        parts.append(f"  {name}={default}")
        parts += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(parts)


def _of(config: type[Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    meanings: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        meanings |= _meanings(cls)
    for setting in fields(config):
        yield f"{prefix}.{setting.name}", _default(setting), meanings.get(setting.name, "")


def _default(setting: Field) -> str:
    """As Hydra writes it."""
    value = setting.default if setting.default_factory is MISSING else setting.default_factory()
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Return field -> the text under it in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node, below in zip(definition.body, definition.body[1:], strict=False):
        text = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else None
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, str):
            found[node.target.id] = " ".join(text.replace("`", "").split())
    return found
