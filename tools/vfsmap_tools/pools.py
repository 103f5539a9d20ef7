"""Commands about a pool as a whole: ``format``, ``info``, ``resize``."""

from pathlib import Path
from typing import Any

import click

from vfsmap.errors import Invalid
from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap.units import LEVELS, PMD, Level, format_size
from vfsmap_tools.console import LEVEL, SIZE, errors_exit, json_option, print_facts, print_line
from vfsmap_tools.mounts import find_mount

POOL = click.Path(path_type=Path)


@click.command("format")
@click.argument("pool", type=POOL)
@click.option("--size", type=SIZE, required=True, help="Size of the pool, for example 8G.")
@click.option("--align", type=LEVEL, default=PMD, help="Unit for large files: 2M (default) or 1G.")
@click.option("--label", default="", help="A name for the pool, up to 63 bytes.")
@click.option(
    "--promise", type=click.Choice(["process", "power"]), help="Refuse a medium that keeps less."
)
@click.option("--force", is_flag=True, help="Destroy what the file holds.")
@errors_exit
def format_command(
    pool: Path, size: int, align: Level, label: str, promise: str | None, force: bool
) -> None:
    """Make a pool with an empty file system in it.

    POOL is a new file: on tmpfs (mounted with huge=always) or hugetlbfs for huge pages, on a disk
    for safety from power loss, or a DAX device.
    """
    if align.size < PMD.size:
        raise Invalid("--align: 2M or 1G is expected")
    made = Pool.create(pool, size, label=label, level=align, replace=force, promise=promise)
    with FileSystem.format(made):
        medium = made.pmem.medium
        print_line(
            f"{pool}: {format_size(size)} on {medium.name}, survives {made.promise.value} loss"
        )


@click.command("info")
@click.argument("path", type=POOL, metavar="POOL|DIR")
@json_option
@errors_exit
def info(path: Path, as_json: bool) -> None:
    """Tell what a pool, or the pool mounted on a directory, is and holds."""
    mounted = find_mount(path) if path.is_dir() else None
    if path.is_dir() and mounted is None:
        raise Invalid(f"{path} is a directory where no pool is mounted")
    with FileSystem(Pool.open(mounted.pool if mounted else path, "r")) as fs:
        facts = pool_facts(fs)
    if mounted:
        facts["mounted_on"] = str(mounted.directory)
    print_facts(facts, as_json=as_json)


def pool_facts(fs: FileSystem) -> dict[str, Any]:
    """Return what there is to say about a pool, sizes in bytes."""
    pool, space, numbers = fs.pool, fs.pool.space, fs.statfs()
    facts: dict[str, Any] = {
        "path": str(pool.path),
        "label": pool.label,
        "uuid": str(pool.uuid),
        "size": pool.size,
        "free": space.free_bytes,
        "available": numbers.bavail * numbers.bsize,
        "files": numbers.files - numbers.ffree,
        "medium": pool.pmem.medium.name,
        "page_size": pool.pmem.medium.page_size,
        "promise": pool.promise.value,
        "align": pool.level.size,
        "log_half": min(place.length for place in pool.journal.halves),
        "log_live": pool.journal.live,
    }
    for level in LEVELS[1:]:
        facts[f"free_in_{format_size(level.size)}_units"] = space.free_in_units(level)
    if pool.failed or pool.complaints:
        facts["damage"] = [str(pool.failed)] * bool(pool.failed) + pool.complaints
    return facts


@click.command("resize")
@click.argument("pool", type=POOL)
@click.argument("size", type=SIZE)
@errors_exit
def resize(pool: Path, size: int) -> None:
    """Make a pool larger; it must not be mounted."""
    with Pool.open(pool) as opened:
        opened.resize(size)
    print_line(f"{pool}: {format_size(size)}")
