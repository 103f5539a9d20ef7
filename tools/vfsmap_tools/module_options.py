"""What the commands ``module ...`` share: options, finding a store, printing rows."""

from pathlib import Path
from typing import Any

import click

from vfsmap.errors import Invalid, NotFound
from vfsmap.guard import POLICIES
from vfsmap.kmod.host import number
from vfsmap.kmod.store import Store
from vfsmap.units import PTE
from vfsmap_tools.console import LEVEL, print_json, print_table

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


def existing(path: Path) -> Store:
    """Return the store in a directory.

    Raises:
        NotFound: there is no such directory.
    """
    if not path.is_dir():
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
