"""The commands ``module ...``: kernel modules and kernels, bound to a host and mapped in place."""

import sys
from pathlib import Path
from typing import Any

import click

import vfsmap
from vfsmap.kmod.bind import bind
from vfsmap.kmod.derive import running_host
from vfsmap.kmod.host import Host
from vfsmap.kmod.kernel import Kernel, bind_kernel, is_kernel
from vfsmap.kmod.layout import Area
from vfsmap.kmod.linker import callers_of
from vfsmap.kmod.module import Module
from vfsmap.kmod.placing import bind_at
from vfsmap.kmod.store import Store
from vfsmap.kmod.userspace import user_host
from vfsmap_tools.console import (
    complain,
    errors_exit,
    json_option,
    print_facts,
    print_json,
    print_line,
)
from vfsmap_tools.module_load import call, load, toggle, trace
from vfsmap_tools.module_options import (
    ADDRESS,
    FILE,
    PATH,
    complain_of,
    existing,
    host_option,
    modules_beside,
    print_rows,
    with_option,
)
from vfsmap_tools.module_sites import sites


@click.group("module")
def module() -> None:
    """Kernel modules and kernels: bound to a host once, mapped in place ever after."""


@module.command("host")
@click.option("--user", is_flag=True, help="Describe an ordinary process instead of the kernel.")
@click.option("-o", "--output", type=PATH, help="Write it here instead of to the terminal.")
@errors_exit
def host_command(user: bool, output: Path | None) -> None:
    """Print the document of the kernel that runs here, as far as it can be seen, as JSON.

    Or that of a process, in which functions of modules can run.
    """
    raw = Host(user_host() if user else running_host()).encode()
    if output is None:
        sys.stdout.write(raw.decode() + "\n")
    else:
        output.write_bytes(raw)


@module.command("add")
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="KO...")
@click.argument("store", type=PATH, metavar="DST")
@host_option
@click.option("--at", type=ADDRESS, help="Where to put the first one, on a unit of 2 MiB.")
@with_option
@json_option
@errors_exit
def add(
    files: tuple[Path, ...],
    store: Path,
    host_path: Path | None,
    at: int | None,
    others: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Bind modules, or a kernel, to a host and keep them in the store DST, a directory.

    Without --host they are bound to a process on this machine, where their functions can run.
    """
    host = _host(host_path)
    opened, modules, kernels = Store(store), [], []
    for path in files:
        raw = path.read_bytes()
        if is_kernel(raw, path.name):
            kernels.append((raw, path.name))
        else:
            modules.append(Module(raw, path.name))
    beside = modules_beside(others, host)
    variants = opened.add(modules, host, at, beside) if modules else []
    variants += [opened.add_kernel(raw, host, beside, file_name=name) for raw, name in kernels]
    rows = [
        {
            "module": v.name,
            "text": f"{v.text.start:#x}",
            "text_bytes": len(v.text),
            "build_id": v.build_id,
        }
        | ({"doubts": v.doubts} if as_json else {})
        for v in variants
    ]
    for variant in variants:
        complain_of(variant.name, variant.doubts)
    print_rows(rows, as_json)


@module.command("ls")
@click.argument("store", type=PATH, metavar="DST")
@json_option
@errors_exit
def ls(store: Path, as_json: bool) -> None:
    """List what a store holds."""
    opened = existing(store)
    rows = []
    for v in opened.index.variants:
        host = opened.host(v)
        rows.append(
            {
                "module": v.name,
                "text": f"{v.text.start:#x}",
                "text_bytes": len(v.text),
                "kernel": host.release,
                "host": host.document.tag or v.host[:8],
                "profile": v.profile[:8],
                "build_id": v.build_id,
            }
        )
    print_rows(rows, as_json)


@module.command("text")
@click.argument("file", type=FILE)
@click.option("--host", "host_path", type=FILE, required=True, help="The host's JSON document.")
@click.option("-o", "--output", type=PATH, required=True, help="Where to write the text.")
@click.option("--at", type=ADDRESS, help="Where to put a module that the host has not loaded.")
@with_option
@json_option
@errors_exit
def text(
    file: Path,
    host_path: Path,
    output: Path,
    at: int | None,
    others: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Write the text of a module or a kernel, bound to a host, as raw bytes."""
    host = Host.open(host_path)
    callers = callers_of(modules_beside(others, host), host)
    raw = file.read_bytes()
    if is_kernel(raw, file.name):
        kernel = bind_kernel(Kernel(raw, file.name), host, callers)
        image, doubts = kernel.image, kernel.doubts
        content = image.memory.read(image.text.start, len(image.text))
    else:
        found = Module(raw, file.name)
        if at is None:
            bound = bind(found, host, callers=callers)
        else:
            bound = bind_at(found, host, at, callers)
        image, content, doubts = bound.placed.image, bound.placed.area(Area.TEXT), bound.doubts
    output.write_bytes(content)
    facts: dict[str, Any] = {"text_base": f"{image.text.start:#x}", "text_len": len(content)}
    complain_of(file.name, doubts)
    print_facts(facts | ({"doubts": doubts} if as_json else {}), as_json=as_json)


@module.command("verify")
@click.argument("store", type=PATH, metavar="DST")
@json_option
@errors_exit
def verify(store: Path, as_json: bool) -> None:
    """Check every file of a store against the digest it was sealed with.

    Exit code 3 when a block is damaged.
    """
    opened = existing(store)
    wrong = opened.verify(vfsmap.map)
    files = {
        f"{pack}/{name}": recorded.digest
        for pack, found in opened.index.packs.items()
        for name, recorded in found.files.items()
    }
    if as_json:
        print_json({"files": files, "damaged_blocks": wrong})
    else:
        for name, digest in files.items():
            print_line(f"{digest} {name}")
    if wrong:
        for name, numbers in wrong.items():
            complain(f"{name}: damaged blocks {', '.join(map(str, numbers[:20]))}")
        sys.exit(3)


def _host(path: Path | None) -> Host:
    return Host(user_host()) if path is None else Host.open(path)


for _command in (load, sites, call, toggle, trace):
    module.add_command(_command)
