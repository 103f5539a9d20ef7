"""Commands about sealed files: ``seal``, ``verify``."""

import os
from collections.abc import Iterator
from pathlib import Path

import click

import vfsmap
from vfsmap.daemon.client import SEAL_XATTR, connect, medium_of
from vfsmap.errors import Damaged, Exists, Invalid
from vfsmap.mapping.window import Window
from vfsmap.units import KIB, MIB, Extent
from vfsmap.verity import ALGORITHMS, Descriptor, Parameters, Verifier, blocks
from vfsmap_tools.console import (
    SIZE,
    errors_exit,
    json_option,
    print_facts,
    print_json,
    print_line,
    progress,
)
from vfsmap_tools.copying import require_on_pool

PATH = click.Path(path_type=Path)
_SLICE = 8 * MIB
_MOST_NAMED = 20


@click.command("seal")
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--hash-alg", type=click.Choice(list(ALGORITHMS)), default="sha256", help="The hash function."
)
@click.option("--block-size", type=SIZE, default=4 * KIB, help="What is hashed at once: 4K.")
@click.option("--salt", default="", metavar="HEX", help="Up to 32 bytes that go before each block.")
@json_option
@errors_exit
def seal(files: tuple[Path, ...], hash_alg: str, block_size: int, salt: str, as_json: bool) -> None:
    """Fix the content of files for ever, and print their digests.

    The digest is that of fs-verity: what `fsverity digest FILE` prints, with the same options.
    """
    wanted = Parameters.decode(f"hash={hash_alg} block={block_size} salt={salt}")
    sealed: list[dict[str, str]] = []
    try:
        for file in files:
            sealed.append({"file": str(file), "digest": _sealed(file, wanted)})
            if not as_json:
                print_line(f"{sealed[-1]['digest']} {file}")
    finally:
        if as_json:
            print_json(sealed)


def _sealed(file: Path, wanted: Parameters) -> str:
    """Seal a file; return its digest."""
    require_on_pool(file)
    if file.is_dir():
        raise Invalid(f"{file} is a directory; name files to seal")
    try:
        os.setxattr(file, SEAL_XATTR, wanted.encode().encode())
    except FileExistsError as exc:
        raise Exists(f"{file} is sealed already; check it with: vfsmap verify {file}") from exc
    return os.getxattr(file, SEAL_XATTR).decode()


@click.command("verify")
@click.argument("file", type=PATH)
@click.option("--offset", type=SIZE, default=0, help="Check only from here on.")
@click.option("--length", type=SIZE, help="Check only so many bytes.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
@json_option
@errors_exit
def verify(file: Path, offset: int, length: int | None, quiet: bool, as_json: bool) -> None:
    """Check a sealed file, in the pool itself, against its digest; name damaged blocks.

    Exit code 3 when a block is damaged.
    """
    descriptor, tree = _seal_of(file)
    block = descriptor.block_size
    first = offset - offset % block
    end = descriptor.size if length is None else min(offset + length, descriptor.size)
    verifier = Verifier(descriptor, tree)
    wrong: list[int] = []
    if first < end:
        with vfsmap.map(file, offset=first) as window, progress(hidden=quiet or as_json) as bar:
            task = bar.add_task("verifying", total=end - first)
            for at, piece in _pieces(window, end - first, block):
                wrong += verifier.damaged(first + at, piece)
                bar.update(task, completed=at + len(piece))
                piece.release()
    facts = {
        "file": str(file),
        "digest": str(descriptor),
        "bytes_checked": max(end - first, 0),
        "damaged_blocks": wrong,
        "block_size": block,
    }
    named = ", ".join(map(str, wrong[:_MOST_NAMED])) + (", ..." if wrong[_MOST_NAMED:] else "")
    print_facts(facts if as_json else facts | {"damaged_blocks": named or "none"}, as_json=as_json)
    if wrong:
        raise Damaged(f"{file}: {len(wrong)} blocks of {block} bytes are damaged: {named}")


def _seal_of(file: Path) -> tuple[Descriptor, bytes]:
    """Return what a file was sealed with; the tree is read from the pool itself."""
    client = connect(file)
    with file.open("rb") as opened:
        answer, _ = client.call("Extents", (opened.fileno(),), file=0, tree=True)
        if not answer["sealed"]:
            raise Invalid(f"{file} is not sealed; seal it with: vfsmap seal {file}")
        descriptor = Descriptor.decode(bytes.fromhex(answer["descriptor"]))
        extents = [Extent(**extent)._replace(offset=0) for extent in answer["extents"]]
        if not extents:
            return descriptor, b""
        granted, descriptors = client.call("Map", (opened.fileno(),), file=0)
        medium = medium_of(granted["medium"])
        tree = b""
        try:
            for extent in extents:  # one by one: on large pages they may not fit beside each other
                fd = descriptors[granted["pool"]]
                with Window(fd, [extent], extent.length, medium) as window:
                    tree += window.view()
            return descriptor, tree
        finally:
            for fd in descriptors:
                os.close(fd)
            client.close()


def _pieces(window: Window, length: int, block: int) -> Iterator[tuple[int, memoryview]]:
    with window.view() as view:
        for number, piece in enumerate(blocks(view[:length], _SLICE)):
            yield number * _SLICE, piece
