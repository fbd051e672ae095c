"""Recipes: steps joined by `+`, such as `layers:1 + finetune:3 + prune:0.5 + int8:parts=table`.

A step is a method's name, after a colon its main value, after commas its options. Which options
there are, and of which type, is read off the method's signature.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from models.compress.draft import CompressionError, Context, Draft

#: A method: a draft and what it may look at, options by keyword.
Method = Callable[..., Draft]

_STEP = re.compile(r"^([a-z][a-z0-9_-]*)(?::(.*))?$")


@dataclass(frozen=True)
class Step:
    """One method with its options."""

    text: str
    method: Method
    options: Mapping[str, Any]


def parse(text: str, methods: Mapping[str, Method]) -> tuple[Step, ...]:
    """Read a recipe.

    Raises:
        CompressionError: a step names no method, no option of it, or a value of the wrong type.
    """
    return tuple(_parse_step(part.strip(), methods) for part in text.split("+"))


def apply(steps: Sequence[Step], draft: Draft, context: Context) -> Draft:
    """Apply the steps in order."""
    for step in steps:
        draft = step.method(draft, context, **step.options)
        draft = replace(draft, steps=(*draft.steps, step.text))
    return draft


def _parse_step(text: str, methods: Mapping[str, Method]) -> Step:
    match = _STEP.match(text)
    if match is None:
        raise CompressionError(f"{text!r} is not a step: write method, method:value or"
                               " method:value,option=value, joined by +")  # fmt: skip
    name, rest = match.groups()
    method = methods.get(name)
    if method is None:
        raise CompressionError(f"no method {name!r}; there are {', '.join(sorted(methods))}")
    parameters = [
        p
        for p in inspect.signature(method).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    hints = get_type_hints(method)
    options: dict[str, Any] = {}
    for place, part in enumerate(rest.split(",") if rest else []):
        key, equals, value = part.strip().partition("=")
        if not equals:
            if place or not parameters:
                raise CompressionError(f"{text!r}: {part!r} must be option=value")
            key, value = parameters[0].name, key
        if key not in {p.name for p in parameters}:
            known = ", ".join(p.name for p in parameters) or "none"
            raise CompressionError(f"{text!r}: {name} has no option {key!r}; it has {known}")
        options[key] = _converted(value, hints[key], f"{text!r}: {key}")
    for parameter in parameters:
        if parameter.default is inspect.Parameter.empty and parameter.name not in options:
            raise CompressionError(f"{text!r}: {name} needs a value, {name}:{parameter.name}")
    return Step(text, method, options)


def _converted(value: str, kind: Any, where: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "yes": True, "no": False}[value.lower()]
        if kind is float and value.endswith("%"):
            return float(value[:-1]) / 100.0
        return kind(value)
    except (ValueError, KeyError):
        raise CompressionError(f"{where} must be a {kind.__name__}, not {value!r}") from None
