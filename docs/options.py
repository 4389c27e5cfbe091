"""Write docs/options.md from the options that the programs declare: `python -m docs.options`."""

from pathlib import Path

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


def page() -> str:
    """The whole page."""
    header = ("Option", "Environment", "Default", "Must be", "What it does")
    return "\n".join((INTRODUCTION, GATEWAY, table(header, gateway_rows())))


if __name__ == "__main__":
    PAGE.write_text(page())
