"""``vfsmap module sites``: what a kernel would patch, counted."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

from vfsmap.errors import Damaged, Invalid, VfsmapError
from vfsmap.kmod.kernel import Kernel, is_kernel
from vfsmap.kmod.module import find_modules
from vfsmap.kmod.survey import TIERS, Survey, survey_file, survey_kernel
from vfsmap.units import format_size
from vfsmap_tools.console import (
    complain,
    errors_exit,
    json_option,
    print_json,
    print_line,
    print_table,
    progress,
)
from vfsmap_tools.module_options import FILE, PATH

_CHUNK = 8


@click.command("sites")
@click.argument("file", type=FILE, required=False)
@click.option("--all", "directory", type=PATH, help="Count over all modules of a directory.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
@json_option
@errors_exit
def sites(file: Path | None, directory: Path | None, quiet: bool, as_json: bool) -> None:
    """Count the places in text that a kernel would patch, by kind, and the pages they touch.

    FILE is a module or a kernel (vmlinuz, vmlinux).
    """
    if (file is None) == (directory is None):
        raise Invalid("name a file, or a directory with --all")
    if file is not None:
        raw = file.read_bytes()
        found = (
            survey_kernel(Kernel(raw, file.name))
            if is_kernel(raw, file.name)
            else survey_file(file)
        )
    else:
        assert directory is not None
        found = survey_all(find_modules(directory), hidden=quiet or as_json)
        if not found.modules:
            raise Damaged(f"no file below {directory} is a module")
    if as_json:
        print_json(found.as_dict())
    else:
        _print_survey(found)


def survey_all(paths: list[Path], *, hidden: bool) -> Survey:
    """Survey many modules with all CPUs; a file that is no module is complained about."""
    total = Survey()
    paths = sorted(paths, key=lambda path: -path.stat().st_size)
    with ProcessPoolExecutor() as pool, progress(hidden=hidden) as bar:
        task = bar.add_task("modules", total=sum(path.stat().st_size for path in paths))
        results = pool.map(_survey_or_error, paths, chunksize=_CHUNK)
        for path, result in zip(paths, results, strict=True):
            if isinstance(result, str):
                complain(result)
            else:
                total.add(result)
            bar.advance(task, path.stat().st_size)
    return total


def _survey_or_error(path: Path) -> Survey | str:
    try:
        return survey_file(path)
    except (VfsmapError, OSError) as exc:
        return str(exc)


def _print_survey(found: Survey) -> None:
    pages = found.text_pages
    print_line(
        f"{found.modules} images, {found.text_bytes} bytes of text in {pages} pages of 4K "
        f"({format_size(found.init_bytes)} of init text beside it)"
    )
    print_table(("table", "sites", "pages", "%"), _kind_rows(found))
    print_table(("relocations", "count"), [[k, n] for k, n in found.relocations.most_common()])
    if not found.is_kernel:
        _print_tiers(found, pages)


def _print_tiers(found: Survey, pages: int) -> None:
    print_table(
        ("tier", "pages", "%", "when"),
        (
            [tier, found.tier_pages[tier], _share(found.tier_pages[tier], pages), what]
            for tier, what in TIERS.items()
        ),
    )


def _kind_rows(found: Survey) -> Iterator[list[object]]:
    for name, kind in found.kinds.items():
        yield [name, kind.sites, kind.pages or "", _share(kind.pages, found.text_pages)]
    yield ["patched at all", "", found.patched_pages, _share(found.patched_pages, found.text_pages)]
    yield [
        "patched or relocated",
        "",
        found.touched_pages,
        _share(found.touched_pages, found.text_pages),
    ]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole and part else ""
