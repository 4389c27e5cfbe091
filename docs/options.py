"""Write docs/options.md from the options that the programs declare: `python -m docs.options`."""

import argparse
from pathlib import Path

from engine import cli
from engine import options as engine
from server.config import Config
from server.options import options_of

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = """\
# Options

<!-- Written by `make docs` from the code. Do not edit. -->
"""

GATEWAY = """\
## The gateway

`python -m server`. An option that is not on the command line is read from its environment variable. A value out of
bounds ends the program with a message that names the option. What follows `--` goes to the engine.
"""

ENGINE = """\
## The engine

`python -m server --model MODEL -- OPTIONS` passes these options to the engine. They have no environment variables.
"""

COMMANDS = """\
## Commands of the engine

`python -m engine COMMAND` works on weights and presets, and serves nothing.
"""


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(text: str) -> str:
    """`text` as Markdown code; empty stays empty."""
    return f"`{text}`" if text else ""


def gateway_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for option in options_of(Config):
        flag = "" if option.secret else f"--{option.flag}"
        has_value = option.default not in (None, (), "")
        default = code(str(option.default)) if has_value else option.unset or "none"
        rows.append((code(flag), code(option.variable), default, option.bounds_text, option.help))
    return rows


def argument_rows(group: argparse._ArgumentGroup) -> list[tuple[str, ...]]:
    """A row for each argument of a group: its name, its values, its help text with the default."""
    rows: list[tuple[str, ...]] = []
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        value = "" if action.nargs == 0 else action.metavar or "|".join(action.choices or ()) or action.dest.upper()
        name = action.option_strings[0] if action.option_strings else action.dest.upper()
        rows.append((code(name), code(str(value)), (action.help or "") % {"default": action.default}))
    return rows


def argument_tables(parser: argparse.ArgumentParser) -> list[str]:
    """The tables of a parser, one for each group that has a description."""
    header = ("Option", "Value", "What it does")
    main = [row for group in parser._action_groups if not group.description for row in argument_rows(group)]
    tables = [table(header, main)] if main else []
    for group in parser._action_groups:
        if group.description:
            tables += [f"{group.description}\n", table(header, argument_rows(group))]
    return tables


def command_tables(parser: argparse.ArgumentParser) -> list[str]:
    """A heading, the help text and the tables of each command of a parser."""
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parts = []
    for entry in commands._choices_actions:
        parts += [f"### {entry.dest}\n", f"{entry.help}\n", *argument_tables(commands.choices[entry.dest])]
    return parts


def page() -> str:
    """The whole page."""
    header = ("Option", "Environment", "Default", "Must be", "What it does")
    gateway = [GATEWAY, table(header, gateway_rows())]
    process = [ENGINE, *argument_tables(engine.create_parser())]
    commands = [COMMANDS, *command_tables(cli.create_parser())]
    return "\n".join((INTRODUCTION, *gateway, *process, *commands))


if __name__ == "__main__":
    PAGE.write_text(page())
