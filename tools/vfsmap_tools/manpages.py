"""Manual pages, made from the help of the commands: ``vfsmap(1)``, ``vfsmap-mount(1)``, ...

The notation is that of man(7).  click-man was tried: it knows no commands that are imported when
they are called, no paragraphs that keep their lines, and masks nothing in the text.
"""

import inspect
import re
import time
from collections.abc import Iterator
from pathlib import Path

import click

import vfsmap

_KEEP_LINES = "\b"


def pages(command: click.Command, name: str = "vfsmap") -> dict[str, str]:
    """Return the manual page of a command, and of each below it, by file name."""
    return {
        context.command_path.replace(" ", "-") + ".1": _page(context)
        for context in _contexts(_context(command, name))
    }


def _context(
    command: click.Command, name: str, parent: click.Context | None = None
) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def _contexts(context: click.Context) -> Iterator[click.Context]:
    yield context
    for name, command in _subcommands(context):
        yield from _contexts(_context(command, name, context))


def _subcommands(context: click.Context) -> Iterator[tuple[str, click.Command]]:
    group = context.command
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if command and not command.hidden:
                yield name, command


def _page(context: click.Context) -> str:
    command = context.command
    title = context.command_path.replace(" ", "-")
    text = inspect.cleandoc(command.help or "")
    summary = " ".join(text.partition("\n\n")[0].split())
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH {_plain(title.upper())} 1 "{_date()}" "vfsmap {vfsmap.__version__}" "vfsmap manual"',
        ".SH NAME",
        rf"{_plain(title)} \- {_plain(summary[:1].lower() + summary[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        rf"\fB{_plain(context.command_path)}\fP {_plain(usage)}",
        ".SH DESCRIPTION",
        *_paragraphs(text),
        ".SH OPTIONS",
    ]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and record[1]:
            lines += [".TP", rf"\fB{_plain(record[0])}\fP", _plain(record[1])]
    commands = list(_subcommands(context))
    if commands:
        lines.append(".SH COMMANDS")
    for name, below in commands:
        help_line = below.get_short_help_str(limit=1000)
        lines += [".TP", rf"\fB{_plain(title)}\-{_plain(name)}\fP(1)", _plain(help_line)]
    above = context.parent
    others = ["vfsmap"] if above is None else [above.command_path.replace(" ", "-")]
    if others != [title]:
        lines += [".SH SEE ALSO", *(rf"\fB{_plain(other)}\fP(1)" for other in others)]
    return "\n".join(lines) + "\n"


def _date() -> str:
    """Return the day of this version: an installation's files keep it."""
    return time.strftime("%Y-%m-%d", time.gmtime(Path(__file__).stat().st_mtime))


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n{2,}", text.strip(" \n"))):
        lines = paragraph.split("\n")
        if number:
            yield ".PP"
        if lines[0].strip(" ") == _KEEP_LINES:
            yield ".nf"
            yield from map(_plain, lines[1:])
            yield ".fi"
        else:
            yield _plain(" ".join(line.strip() for line in lines))


def _plain(text: str) -> str:
    r"""Mask what means something to roff: backslashes, and dots and quotes that begin a line."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("~", r"\(ti").replace("^", r"\(ha")
    return r"\&" + text if text.startswith((".", "'")) else text
