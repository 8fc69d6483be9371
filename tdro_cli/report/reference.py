"""Writes docs/recipe.md from the recipe's models and the installed plugins, docs/commands.md from the command line.

`python -m tdro_cli.report.reference recipe`, and `... commands`.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections import Counter
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
            if isinstance(field.default, Section) and type(None) in typing.get_args(field.annotation):
                yield f"{above}{name}", field, default  # what null means there
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


# ---- commands ----

COMMANDS = """\
# Commands

`tdro COMMAND --help` says the same on a terminal. RECIPE is `recipe.yaml` of the working directory where none is named.
Exit codes: 0 done, 2 a fault of the recipe, the data or the command line, 1 a run that failed, 130 stopped with Ctrl-C
(the same command goes on from the newest checkpoint).

What many commands take is described here once:

{shared}

Completion of commands and options in the shell: `tdro --install-completion`, or `tdro --show-completion` to put it
where you want it. Completion of recipe keys in an editor: `tdro recipe schema > recipe.schema.json`, and as the first
line of the recipe `# yaml-language-server: $schema=recipe.schema.json`.

This page is generated: `make docs`.
"""
SHARED = 5  # an option of at least so many commands is described once


def commands_page() -> str:
    """Every command with its arguments and options, as Markdown."""
    from typer.main import get_command

    from tdro_cli.cli import app

    commands = dict(_commands(get_command(app), "tdro"))
    counts = Counter(_names(option) for command in commands.values() for option in _options(command))
    described = {_names(option): option for command in commands.values() for option in _options(command)}
    shared = {names for names, count in counts.items() if count >= SHARED}
    lines = ["| option | meaning |", "|---|---|", *(_option_row(described[names]) for names in sorted(shared))]
    parts = [COMMANDS.format(shared="\n".join(lines))]
    return "\n".join([*parts, *(_command(name, command, shared) for name, command in commands.items())]).rstrip() + "\n"


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for short, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {short}")
        elif not command.hidden:
            yield f"{name} {short}", command


def _command(name: str, command: Any, shared: set[str]) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    own = [option for option in _options(command) if _names(option) not in shared]
    others = sorted(_names(option).split(",")[0] for option in _options(command) if _names(option) in shared)
    usage = " ".join([name, *(_metavar(argument) for argument in arguments), *(["[OPTIONS]"] if own or others else [])])
    lines = [f"## {name}", "", command.help or "", "", "```", usage, "```", ""]
    if arguments or own:
        lines += ["| | meaning |", "|---|---|"]
        lines += [f"| `{_metavar(p)}` | {_meaning(p)} |" for p in arguments]
        lines += [_option_row(option) for option in own]
        lines += [""]
    if others:
        lines += [f"Also {', '.join(f'`{other}`' for other in others)}.", ""]
    return "\n".join(lines)


def _options(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "option" and p.name != "help" and not p.hidden]


def _names(option: Any) -> str:
    return ", ".join([*sorted(option.opts, key=len, reverse=True), *option.secondary_opts])


def _metavar(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        words = (parameter.metavar or parameter.name.upper()).strip("[]")
        return words if parameter.required else f"[{words}]"
    if parameter.is_flag:
        return ""
    return parameter.metavar or {int: "N", float: "NUMBER"}.get(parameter.bare_type(), "TEXT")


def _option_row(option: Any) -> str:
    return f"| `{' '.join([_names(option), _metavar(option)]).strip()}` | {_meaning(option)} |"


def _meaning(parameter: Any) -> str:
    default = parameter.default() if callable(parameter.default) else parameter.default
    told = f"; default `{default}`" if default not in (None, False, (), [], "") and not parameter.required else ""
    return f"{parameter.help or ''}{told}".replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    pages = {"recipe": page, "commands": commands_page}
    print(pages[sys.argv[1] if len(sys.argv) > 1 else "recipe"](), end="")
