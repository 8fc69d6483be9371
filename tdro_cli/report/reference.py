"""Writes docs/recipe.md, from the recipe's models and the installed plugins: `python -m tdro_cli.report.reference`."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from tdro_cli import registry
from tdro_cli.recipe import EXECUTION, PluginChoice, Recipe, Section

INTRODUCTION = """\
# The recipe

One YAML file describes everything that changes the numbers of an experiment; a section for each stage. Unknown keys are
refused, and all faults are reported together with file, line and remedy (`tdro recipe check`). Only `tasks` must be
given. `mine`, `dedup`, `lora` and `eval` are not run or not used when they are left out; a section with nothing under
it takes the defaults.

* `${NAME}` and `${NAME:-default}` in a text stand for environment variables.
* Paths are relative to the working directory. `tasks` may be the path of a YAML file that lists them, relative to the
  working directory or to the recipe.
* A plugin is chosen by name, `weight_updater: doremi`, or with options,
  `weight_updater: {name: doremi, options: {...}}`; `tdro plugins` lists what is installed.
* `--set KEY.PATH=VALUE` overrides a key for one command: `--set finetune.steps=200`, `--set tasks.NAME.prompt='...'`,
  `--set transfer.strategy.options.percent=70`, `--set mine=null`.
* Keys marked ° say how or where to run; they change no result beyond rounding and are no part of a run's digest.

This page is generated: `make docs`.
"""


def page() -> str:
    """The whole page as Markdown; plugins of other distributions are left out."""
    parts = [INTRODUCTION, text_table(Recipe, "Top level", deeper=False)]
    for name, field in Recipe.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            parts.append(text_table(section, f"`{name}`", deeper=True))
    return "\n".join([*parts, _plugins()])


def text_table(section: type[Section], title: str, *, deeper: bool) -> str:
    words = vars(section).get("__doc__")
    lines = [f"## {title}", "", *([inspect.cleandoc(words), ""] if words else [])]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field, default in _rows(section, deeper):
        mark = "°" if field.json_schema_extra == EXECUTION else ""
        meaning = (field.description or "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{key}`{mark} | {_values(field)} | {_default(field, default)} | {meaning} |")
    return "\n".join([*lines, ""])


def _rows(section: type[Section], deeper: bool, above: str = "", values: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """(key, field, default) of a section and of those inside it; `values`: what it is when it is left out."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        default = field.default if values is None else getattr(values, name)
        if inner is not None and inner is not PluginChoice and deeper:
            yield from _rows(inner, deeper, f"{above}{name}.", default if isinstance(default, Section) else None)
        else:
            yield f"{above}{name}", field, default


def _section(annotation: Any) -> type[Section] | None:
    """The section that a key holds, alone, in a list, or as one of two possibilities."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    arguments = typing.get_args(annotation) if typing.get_origin(annotation) is not Literal else ()
    return next((found for argument in arguments if (found := _section(argument))), None)


def _values(field: Any) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    bounds = [words for item in field.metadata if (words := _bound(item))]
    text = f"plugin, {registry.singular(extra['plugin_kind'])}" if "plugin_kind" in extra else _type(field.annotation)
    return " ".join([text, ", ".join(bounds)]).strip()


def _bound(item: Any) -> str:
    for kind, sign, name in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
        if isinstance(item, kind):
            bound = getattr(item, name)
            return f"{sign} 2⁶³" if bound == 2**63 else f"{sign} {bound:g}"
    return ""


NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", type(None): "null"}


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        extra = [e for a in arguments[1:] if isinstance(e := getattr(a, "json_schema_extra", None), dict)]
        kinds = [registry.singular(e["plugin_kind"]) for e in extra if "plugin_kind" in e]
        return f"plugin, {kinds[0]}" if kinds else _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return NAMES.get(origin or annotation, str(annotation))


def _default(field: Any, value: Any) -> str:
    if field.is_required():
        return "must be given"
    if isinstance(value, PluginChoice):
        return f"`{value.name}`"
    if isinstance(value, Section):
        return "its defaults"
    if value is None:
        return "null" if _section(field.annotation) is None else "absent"
    shown = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    return f"`{shown!r}`" if isinstance(shown, dict | list) else f"`{shown}`" if shown != "" else "empty"


_PLAIN = {"None": "null", "True": "true", "False": "false"}


def _plugins() -> str:
    lines = ["## Plugins that come with tdro", "", "The options of each, with their defaults.", ""]
    for kind in registry.KINDS:
        lines += [
            f"### {registry.singular(kind).capitalize()}",
            "",
            "| name | options | what it does |",
            "|---|---|---|",
        ]
        for row in registry.listing():
            if row["kind"] == kind and row["distribution"] == "tdro":
                options = ", ".join(f"`{name}` {_PLAIN.get(v, v)}" for name, v in row["options"].items()) or "none"
                lines.append(f"| `{row['name']}` | {options} | {row['words']} |".replace("\n", " "))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
