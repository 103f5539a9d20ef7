"""The command ``vfsmap``: its subcommands, each imported when it is called."""

import importlib
import io
import sys
from pathlib import PurePath
from typing import Any

import click

import vfsmap

_COMMANDS = {
    "format": "pools",
    "info": "pools",
    "resize": "pools",
    "check": "check",
    "dump": "dump",
    "mount": "mounting",
    "umount": "mounting",
    "serve": "mounting",
    "cp": "copying",
    "export": "archiving",
    "import": "archiving",
    "map": "mapping",
    "explain": "explain",
    "seal": "sealing",
    "verify": "sealing",
    "leases": "watching",
    "events": "watching",
    "top": "top",
    "pstore": "pstore",
    "module": "module",
    "system": "system",
    "completion": "completion",
    "demo": "demo",
    "bench": "bench.command",
}
"""Each command and the module of this package that holds it, in the order of ``--help``."""

_INTERRUPTED = 130
"""What a shell says of a program that SIGINT has ended."""
_HELPERS = {"mount.fuse.vfsmap": "helper", "umount.fuse.vfsmap": "helper"}
"""Commands for mount(8) and umount(8), which nobody types."""


def as_command(program: str, arguments: list[str]) -> list[str]:
    """Return the arguments of ``vfsmap`` that a call by mount(8) or umount(8) means.

    Args:
        program: the name by which we were called.
        arguments: what came with it.
    """
    name = PurePath(program).name
    if name in _HELPERS:
        return [name, *arguments]
    if len(arguments) > 1 and "/" in arguments[0]:  # no command has one in its name
        return ["mount.fuse.vfsmap", *arguments]
    return arguments


class Lazy(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which one meets them."""
        return list(_COMMANDS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what was typed, or what mount(8) has called us with."""
        return super().parse_args(ctx, as_command(sys.argv[0], args))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run what was typed; say in one line what was wrong with it."""
        extra["standalone_mode"] = False
        if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error is
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **extra)
        except click.exceptions.NoArgsIsHelpError as exc:
            exc.show()
            code = exc.exit_code
        except click.ClickException as exc:
            context = getattr(exc, "ctx", None)
            see = f"; see: {context.command_path} --help" if context else ""
            _complain(" ".join(exc.format_message().split()).rstrip(".") + see)
            code = exc.exit_code
        except click.Abort:
            _complain("interrupted")
            code = _INTERRUPTED
        except OSError as exc:  # commands tell of their own; this is help, or a version
            _complain(f"{exc.filename or 'standard output'}: {exc.strerror}")
            code = 1
        sys.exit(code if isinstance(code, int) else 0)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        home = _COMMANDS.get(cmd_name) or _HELPERS.get(cmd_name)
        if home is None:
            return None
        module = importlib.import_module(f"vfsmap_tools.{home}")
        name = cmd_name.replace(".", "_")
        attribute = f"{name}_command" if hasattr(module, f"{name}_command") else name
        command: Any = getattr(module, attribute)
        assert isinstance(command, click.Command)
        return command


def _complain(text: str) -> None:
    from vfsmap_tools.console import complain  # here, not above: --version needs it not

    complain(text)


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vfsmap.__version__, prog_name="vfsmap")
def main() -> None:
    """Name a file, get its bytes as aligned huge pages.

    A pool is a file that holds a crash-consistent file system; mount it, and map any of its files
    straight out of the pool.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a damaged pool or file, 130 interrupted.
    """


if __name__ == "__main__":
    main()
