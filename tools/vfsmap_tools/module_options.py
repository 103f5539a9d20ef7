"""What the commands ``module ...`` share: options, finding a store, printing rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vfsmap.errors import Invalid, NotFound
from vfsmap.guard import POLICIES
from vfsmap.kmod.host import Host, number
from vfsmap.kmod.module import Module, find_modules
from vfsmap.kmod.store import INDEX, Store
from vfsmap.units import PTE
from vfsmap_tools.console import LEVEL, complain, print_json, print_table

PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


class AddressType(click.ParamType[int]):
    """An address such as ``0xffffffffc0000000``."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the address that a text names."""
        try:
            return number(value)
        except Invalid as exc:
            self.fail(str(exc), param, ctx)


ADDRESS = AddressType()
host_option = click.option("--host", "host_path", type=FILE, help="The host's JSON document.")
policy_option = click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="redirect",
    help="What happens to writes to text: refuse them, or redirect them to private copies.",
)
pmsg_option = click.option(
    "--pmsg", "log", type=FILE, help="A crash log to keep refused writes in, as pmsg lines."
)
granularity_option = click.option(
    "--granularity", type=LEVEL, default=PTE, help="What a redirected write copies: 4K or 2M."
)


with_option = click.option(
    "--with",
    "others",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="A module that the host has, or had, loaded as well, or a directory to look for those in "
    "that it has: what they call is known then, where calls are counted.",
)


def modules_beside(paths: Sequence[Path], host: Host) -> list[Module]:
    """Return the modules that a host has, or had, loaded: of directories those that it has."""
    found = {}
    for path in paths:
        for file in find_modules(path) if path.is_dir() else [path]:
            name = file.name.partition(".")[0].replace("-", "_")
            if name in host.modules or not path.is_dir():
                found[name] = Module.open(file)
    return list(found.values())


def complain_of(name: str, doubts: Sequence[str]) -> None:
    """Print what is in doubt about an image that was bound."""
    for doubt in doubts:
        complain(f"{name}: {doubt}")


def existing(path: Path) -> Store:
    """Return the store in a directory.

    Raises:
        NotFound: there is none.
    """
    if not (path / INDEX).is_file():
        raise NotFound(f"{path} is no store; make one with: vfsmap module add KO... {path}")
    return Store(path)


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows of facts, as a table or as JSON."""
    if as_json:
        print_json(rows)
    elif rows:
        # build ids are told apart by their beginnings
        values = ([str(v)[:20] if k == "build_id" else v for k, v in r.items()] for r in rows)
        print_table(list(rows[0]), values)
