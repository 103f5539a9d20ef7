"""The command ``dump``: a pool's metadata as text, as far as it can be read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from vfsmap.fs.draft import Draft, Run
from vfsmap.fs.inode import Inode
from vfsmap.pmem import Pmem
from vfsmap.pool.layout import USER_TAG
from vfsmap.pool.scan import Scan, scan
from vfsmap_tools.console import errors_exit, json_option, print_json, print_line

_LEFT_OUT: Final = ("blocks", "flags")


@click.command("dump")
@click.argument("pool", type=click.Path(path_type=Path))
@json_option
@errors_exit
def dump(pool: Path, as_json: bool) -> None:
    """Print a pool's metadata: superblock, log, files, names, extents.

    Nothing is written, and a damaged pool is printed as far as it can be read.
    """
    pmem = Pmem.open(pool, writable=False)
    try:
        found = scan(pmem)
    finally:
        pmem.close()
    if as_json:
        print_json(_document(found))
    else:
        for line in describe(found):
            print_line(line)


def describe(found: Scan) -> Iterator[str]:
    """Yield what a pool holds as lines for a person."""
    return _lines(_document(found))


def _document(found: Scan) -> dict[str, Any]:
    draft = Draft(found.objects, found.objects.written, found.next_oid)
    return {
        "superblock": _superblock(found),
        "log": {
            "batches": len(found.batches),
            "tail": found.tail,
            "damage": [str(gap) for gap in found.gaps] + found.nonsense,
        },
        "objects": len(found.objects),
        "next_object": found.next_oid,
        "inodes": [_inode(inode) for inode in draft.inodes.values()],
        "names": [
            {
                "object": oid,
                "parent": dirent.parent,
                "name": _text(dirent.name),
                "inode": dirent.ino,
                "kind": f"{dirent.kind:o}",
            }
            for oid, dirent in draft.names.items()
        ],
        "extents": _runs(draft.extents.items()),
        "attributes": [
            {"object": oid, "inode": attribute.ino, "name": _text(attribute.name)}
            for oid, attribute in draft.xattrs.items()
        ],
        "tree_extents": _runs(draft.trees.items()),
        "typed": [
            {"object": oid, "tag": int.from_bytes(rec[4:8], "little"), "bytes": len(rec)}
            for oid, rec in found.objects.items()
            if int.from_bytes(rec[4:8], "little") & USER_TAG
        ],
        "undecodable": [str(finding) for finding in draft.findings],
    }


def _superblock(found: Scan) -> dict[str, Any]:
    sb = found.superblock
    return {
        "uuid": bytes(sb.uuid).hex(),
        "label": _text(bytes(sb.label).rstrip(b"\0")),
        "version": sb.version,
        "size": sb.size,
        "file_size": found.size,
        "epoch": sb.epoch,
        "generation": sb.generation,
        "active_half": sb.active,
        "halves": [{"start": half.start, "length": half.length} for half in sb.halves],
        "unit": 1 << sb.align if sb.align < 64 else None,
        "created_ns": sb.created_ns,
        "durable_batches": sb.batches,
        "complaints": found.complaints,
    }


def _inode(inode: Inode) -> dict[str, Any]:
    fields = {name: getattr(inode, name) for name in Inode.__slots__ if name not in _LEFT_OUT}
    fields["mode"] = f"{inode.mode:o}"
    fields["sealed"] = inode.sealed
    fields["align"] = inode.align
    return fields


def _runs(runs: Iterable[tuple[int, Run]]) -> list[dict[str, int]]:
    return [{"object": oid, **run._asdict()} for oid, run in runs]


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")


def _lines(document: dict[str, Any]) -> Iterator[str]:
    for name, value in document["superblock"].items():
        if name == "halves":
            value = ", ".join(f"{half['start']:#x}+{half['length']:#x}" for half in value)
        yield f"superblock {name.replace('_', ' ')}: {value}"
    for name, value in document["log"].items():
        yield f"log {name}: {value}"
    yield f"objects: {document['objects']}, next {document['next_object']}"
    for inode in document["inodes"]:
        yield f"inode {inode['ino']} " + " ".join(
            f"{name}={value}" for name, value in inode.items() if name != "ino"
        )
    for name in document["names"]:
        yield f"name {name['parent']}/{name['name']} -> {name['inode']}"
    for kind in ("extents", "tree_extents"):
        for run in document[kind]:
            where = f"{run['offset']:#x} at {run['start']:#x}+{run['length']:#x}"
            yield f"{kind[:-1].replace('_', ' ')} of {run['owner']}: {where}"
    for attribute in document["attributes"]:
        yield f"attribute {attribute['name']} of {attribute['inode']}"
    for typed in document["typed"]:
        yield f"object {typed['object']}: tag {typed['tag']:#x}, {typed['bytes']} bytes"
    for line in document["undecodable"]:
        yield f"undecodable: {line}"
