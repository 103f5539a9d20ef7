"""The command ``vfsmap``: its subcommands, each imported when it is called."""

import importlib
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
    "pstore": "pstore",
    "module": "module",
    "demo": "demo",
}
"""Each command and the module of this package that holds it, in the order of ``--help``."""


class Lazy(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which one meets them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        home = _COMMANDS.get(cmd_name)
        if home is None:
            return None
        module = importlib.import_module(f"vfsmap_tools.{home}")
        attribute = f"{cmd_name}_command" if hasattr(module, f"{cmd_name}_command") else cmd_name
        command: Any = getattr(module, attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vfsmap.__version__, prog_name="vfsmap")
def main() -> None:
    """Name a file, get its bytes as aligned huge pages.

    A pool is a file that holds a crash-consistent file system; mount it, and map any of its files
    straight out of the pool.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a damaged pool or file.
    """


if __name__ == "__main__":
    main()
