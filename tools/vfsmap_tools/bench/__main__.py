"""Every measurement, one after the other: ``python -m vfsmap_tools.bench [--quick]``."""

import subprocess
import sys
from typing import Final

import click

PARTS: Final = {
    "fuse": ("--rounds", "3"),
    "mapping": ("--quick",),
    "opening": ("--quick",),
    "cow": ("--quick",),
}
"""The modules of this package, and what makes each of them quick."""


@click.command()
@click.option("--quick", is_flag=True, help="Some minutes instead of a quarter of an hour.")
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
def main(quick: bool, parts: tuple[str, ...]) -> None:
    """Measure vfsmap beside its peers; exit with 1 when a promise is not kept."""
    broken = []
    for part in parts or PARTS:
        print(f"\n== {part}", flush=True)
        options = PARTS[part] if quick else ()
        command = [sys.executable, "-m", f"vfsmap_tools.bench.{part}", *options]
        if subprocess.run(command, check=False).returncode:
            broken.append(part)
    if broken:
        print(f"\nnot all promises are kept: {', '.join(broken)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
