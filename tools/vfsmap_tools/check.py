"""The command ``check``: what is wrong with a pool, and mending it."""

import sys
from pathlib import Path
from typing import Any

import click

from vfsmap.errors import Damaged, PoolDamaged, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.check import Report, check
from vfsmap.fs.draft import Finding
from vfsmap.fs.inode import ROOT
from vfsmap.fs.repair import repair
from vfsmap.pmem import Pmem
from vfsmap.pool import Pool
from vfsmap.pool.scan import scan
from vfsmap_tools.console import errors_exit, json_option, print_json, print_line
from vfsmap_tools.sealer import damaged_blocks


@click.command("check")
@click.argument("pool", type=click.Path(path_type=Path))
@click.option("--repair", "mend", is_flag=True, help="Mend what can be mended without guessing.")
@click.option("--dry-run", is_flag=True, help="With --repair: only tell what would be mended.")
@json_option
@errors_exit
def check_command(pool: Path, mend: bool, dry_run: bool, as_json: bool) -> None:
    """Check a pool: superblocks, log, objects, tree, extents and the digests of sealed files.

    Without --repair nothing is written, and the pool may be mounted meanwhile.  A repair needs the
    pool for itself; what has lost its name is put into lost+found.  A repair that was interrupted
    can be started again.

    Exit codes: 0 clean, or mended; 1 failed; 2 wrong usage; 3 damaged.
    """
    mended = mend and not dry_run
    report, seals = _repaired(pool) if mended else _checked(pool)
    findings = [*report.findings, *seals]
    if as_json:
        print_json(_as_json(pool, report, findings, mended=mended))
    else:
        _print(pool, report, findings, mended=mended)
    if seals or not (report.clean or mended):
        sys.exit(PoolDamaged.exit_code)


def _checked(path: Path) -> tuple[Report, list[Finding]]:
    pmem = Pmem.open(path, writable=False)
    try:
        report = check(scan(pmem))
    finally:
        pmem.close()
    # the seals of a damaged pool can only be checked once it is mended
    return report, _broken_seals(path) if report.clean else []


def _repaired(path: Path) -> tuple[Report, list[Finding]]:
    pmem = Pmem.open(path, writable=True)
    try:
        report = repair(pmem)
    finally:
        pmem.close()
    return report, _broken_seals(path)


def _broken_seals(path: Path) -> list[Finding]:
    """Return the sealed files whose content is not what was sealed."""
    with Pool.open(path, "r") as pool:
        if pool.root != ROOT:
            return []
        fs = FileSystem(pool)
        found = [(ino, one) for ino in fs.sealed_inodes() for one in _seal_findings(fs, ino)]
    if found:
        # beside a mount, what was read of a file that was deleted meanwhile may be another's bytes
        with Pool.open(path, "r") as pool:
            still = set(FileSystem(pool).sealed_inodes())
        found = [(ino, one) for ino, one in found if ino in still]
    return [one for _, one in found]


def _seal_findings(fs: FileSystem, ino: int) -> list[Finding]:
    try:
        wrong = damaged_blocks(fs, ino)
    except (Damaged, VfsmapError) as exc:
        return [Finding("seal", f"inode {ino}", str(exc), "restore it from a copy")]
    if not wrong:
        return []
    some = ", ".join(map(str, wrong[:5])) + (" ..." if len(wrong) > 5 else "")
    what = f"{len(wrong)} blocks differ from what was sealed: {some}"
    return [Finding("seal", f"inode {ino}", what, "restore it from a copy")]


def _as_json(
    pool: Path, report: Report, findings: list[Finding], *, mended: bool
) -> dict[str, Any]:
    damage = [finding for finding in findings if not finding.harmless]
    return {
        "pool": str(pool),
        "clean": not damage,
        "repaired": mended and bool(report.damage),
        "files": len(report.draft.inodes),
        "extents": len(report.draft.extents),
        "findings": [finding._asdict() for finding in findings],
    }


def _print(pool: Path, report: Report, findings: list[Finding], *, mended: bool) -> None:
    for finding in findings:
        print_line(f"{'note: ' if finding.harmless else ''}{finding}")
    damage = sum(not finding.harmless for finding in findings)
    counted = f"{len(report.draft.inodes)} files, {len(report.draft.extents)} extents"
    if not damage:
        print_line(f"{pool}: clean, {counted}")
    elif mended:
        left = damage - len(report.damage)
        rest = f"; {left} can't be mended" if left else ""
        print_line(f"{pool}: {len(report.damage)} things mended, {counted}{rest}")
    elif report.clean:
        print_line(f"{pool}: damaged, {damage} findings that no repair mends")
    else:
        print_line(
            f"{pool}: damaged, {damage} findings; mend it with: vfsmap check --repair {pool}"
        )
