"""The commands ``module ...``: kernel modules and kernels, bound to a host and mapped in place."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click

import vfsmap
from vfsmap.errors import Invalid, NotFound, VfsmapError
from vfsmap.guard import POLICIES, Policy, Violation
from vfsmap.kmod.bind import bases_at, bind
from vfsmap.kmod.derive import running_host
from vfsmap.kmod.host import Host, number
from vfsmap.kmod.kernel import Kernel, bind_kernel, is_kernel
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.loader import Loader, Report
from vfsmap.kmod.module import Module, find_modules
from vfsmap.kmod.runner import Runner
from vfsmap.kmod.store import Store
from vfsmap.kmod.survey import TIERS, Survey, survey_file, survey_kernel
from vfsmap.kmod.userspace import user_host
from vfsmap.pstore import Recorder
from vfsmap.units import PTE, Level, format_size
from vfsmap_tools.console import (
    LEVEL,
    complain,
    errors_exit,
    json_option,
    page_sizes_text,
    print_facts,
    print_json,
    print_table,
    progress,
)

PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_CHUNK = 8
_MOST_TOLD = 3


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
@json_option
@errors_exit
def add(
    files: tuple[Path, ...], store: Path, host_path: Path | None, at: int | None, as_json: bool
) -> None:
    """Bind modules, or a kernel, to a host and keep them in the store DST, a directory.

    Without --host they are bound to a process on this machine, where their functions can run.
    """
    host = _host(host_path)
    opened, modules, kernels = Store(store), [], []
    for path in files:
        raw = path.read_bytes()
        if is_kernel(raw, path.name):
            kernels.append(raw)
        else:
            modules.append(Module(raw, path.name))
    variants = [opened.add_kernel(raw, host) for raw in kernels]
    if modules:
        variants += opened.add(modules, host, at)
    rows = [
        {
            "module": v.name,
            "text": f"{v.text.start:#x}",
            "text_bytes": len(v.text),
            "build_id": v.build_id,
        }
        for v in variants
    ]
    _print_rows(rows, as_json)


@module.command("ls")
@click.argument("store", type=PATH, metavar="DST")
@json_option
@errors_exit
def ls(store: Path, as_json: bool) -> None:
    """List what a store holds."""
    opened = _existing(store)
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
    _print_rows(rows, as_json)


@module.command("load")
@click.argument("store", type=PATH, metavar="DST")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@host_option
@policy_option
@granularity_option
@pmsg_option
@click.option("--hold", is_flag=True, help="Keep them loaded until interrupted.")
@json_option
@errors_exit
def load(
    store: Path,
    images: tuple[str, ...],
    host_path: Path | None,
    policy: Policy,
    granularity: Level,
    log: Path | None,
    hold: bool,
    as_json: bool,
) -> None:
    """Load images for a host, and tell what was mapped in place, copied and laid over.

    Without --host they are loaded for the host that they were bound to.  Images for user space are
    put at their own addresses, where their text can run.
    """
    loader = _loader(_existing(store), images[0], host_path, policy, granularity, log, run=True)
    reports = [loader.report(loaded) for loaded in [loader.load(name) for name in images]]
    if as_json:
        print_json([report._asdict() for report in reports])
    else:
        _print_reports(reports)
    if hold:
        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        sys.stdout.flush()
        complain(f"loaded in process {os.getpid()}; interrupt it to end")
        signal.sigwait(ends)


@module.command("sites")
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


@module.command("call")
@click.argument("store", type=PATH, metavar="DST")
@click.argument("image")
@click.argument("function")
@click.argument("arguments", nargs=-1, metavar="ARG...")
@host_option
@policy_option
@json_option
@errors_exit
def call(
    store: Path,
    image: str,
    function: str,
    arguments: tuple[str, ...],
    host_path: Path | None,
    policy: Policy,
    as_json: bool,
) -> None:
    """Run a function of an image in a child process; print what it returns.

    An ARG is a number (10, 0x1f, -1), or a buffer: hex:00ff, text:abc, file:PATH, or zeros:SIZE for
    one to be filled.  What the function leaves in each buffer is printed.
    """
    values = [_argument(text) for text in arguments]
    host = None if host_path is None else Host.open(host_path)
    with Runner(store, [image], vfsmap.map, host=host, policy=policy) as runner:
        result = runner.call(image, function, *values)
    facts: dict[str, Any] = {
        "value": result.value,
        "hex": f"{result.value:#x}",
        "signed": result.signed(64),
    }
    if as_json:
        facts["buffers"] = [buffer.hex() for buffer in result.buffers]
    else:
        facts |= {f"buffer_{i}": buffer.hex() for i, buffer in enumerate(result.buffers)}
    print_facts(facts, as_json=as_json)


def _argument(text: str) -> int | bytes:
    kind, colon, rest = text.partition(":")
    try:
        if not colon:
            return int(text, 0)
        if kind == "hex":
            return bytes.fromhex(rest)
        if kind == "text":
            return rest.encode()
        if kind == "file":
            return Path(rest).read_bytes()
        if kind == "zeros":
            return bytes(int(rest, 0))
    except ValueError:
        pass
    raise Invalid(f"argument {text!r}: a number, hex:..., text:..., file:... or zeros:SIZE")


@module.command("toggle")
@click.argument("store", type=PATH, metavar="DST")
@click.argument("image")
@click.argument("key", required=False)
@click.argument("state", type=click.Choice(["on", "off"]), required=False)
@host_option
@policy_option
@granularity_option
@pmsg_option
@json_option
@errors_exit
def toggle(
    store: Path,
    image: str,
    key: str | None,
    state: str | None,
    host_path: Path | None,
    policy: Policy,
    granularity: Level,
    log: Path | None,
    as_json: bool,
) -> None:
    """Switch the jump labels of a key on or off, through the guard.

    This is done in a process of its own, and tells what it takes.  KEY is a name or an address;
    without one, the image's keys are listed.
    """
    loader = _loader(_existing(store), image, host_path, policy, granularity, log)
    loaded = loader.load(image)
    keys = loaded.subject.keys()
    if key is None:
        if not keys:
            complain(f"{image} has no jump labels, and so no keys")
        _print_rows([{"key": name, "address": f"{a:#x}"} for name, a in keys.items()], as_json)
        return
    if state is None:
        raise Invalid(f"shall {key} be on or off?")
    address = keys[key] if key in keys else number(key)
    count = loader.toggle(loaded, address, state == "on")
    _print_change(loaded.guard.overlaid, count, as_json)


@module.command("trace")
@click.argument("store", type=PATH, metavar="DST")
@click.argument("image")
@click.argument("state", type=click.Choice(["on", "off"]))
@host_option
@policy_option
@granularity_option
@pmsg_option
@json_option
@errors_exit
def trace(
    store: Path,
    image: str,
    state: str,
    host_path: Path | None,
    policy: Policy,
    granularity: Level,
    log: Path | None,
    as_json: bool,
) -> None:
    """Let each function of an image call the tracer, or leave it alone, through the guard.

    This is done in a process of its own, and tells what it takes.
    """
    loader = _loader(_existing(store), image, host_path, policy, granularity, log)
    loaded = loader.load(image)
    count = loader.trace(loaded, state == "on")
    _print_change(loaded.guard.overlaid, count, as_json)


@module.command("text")
@click.argument("file", type=FILE)
@click.option("--host", "host_path", type=FILE, required=True, help="The host's JSON document.")
@click.option("-o", "--output", type=PATH, required=True, help="Where to write the text.")
@click.option("--at", type=ADDRESS, help="Where to put a module that the host has not loaded.")
@click.option(
    "--with",
    "others",
    type=FILE,
    multiple=True,
    help="A module that is loaded as well: calls it has counted are marked in FILE.",
)
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
    callers = [bind(Module.open(path), host) for path in others]
    raw = file.read_bytes()
    if is_kernel(raw, file.name):
        image, _ = bind_kernel(Kernel(raw, file.name), host, callers or None)
        content = image.memory.read(image.text.start, len(image.text))
    else:
        found = Module(raw, file.name)
        bases = None if at is None else bases_at(at, Layout(found))
        bound = bind(found, host, bases)
        image, content = bound.placed.image, bound.placed.area(Area.TEXT)
    output.write_bytes(content)
    facts = {"text_base": f"{image.text.start:#x}", "text_len": len(content)}
    print_facts(facts, as_json=as_json)


@module.command("verify")
@click.argument("store", type=PATH, metavar="DST")
@json_option
@errors_exit
def verify(store: Path, as_json: bool) -> None:
    """Check every file of a store against the digest it was sealed with.

    Exit code 3 when a block is damaged.
    """
    opened = _existing(store)
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
            print(f"{digest} {name}")
    if wrong:
        for name, numbers in wrong.items():
            complain(f"{name}: damaged blocks {', '.join(map(str, numbers[:20]))}")
        sys.exit(3)


def _existing(path: Path) -> Store:
    if not path.is_dir():
        raise NotFound(f"{path} is no store; make one with: vfsmap module add KO... {path}")
    return Store(path)


def _host(path: Path | None) -> Host:
    return Host(user_host()) if path is None else Host.open(path)


def _loader(
    store: Store,
    image: str,
    host_path: Path | None,
    policy: Policy,
    granularity: Level,
    log: Path | None,
    *,
    run: bool = False,
) -> Loader:
    host = store.host(store.find(image)[0]) if host_path is None else Host.open(host_path)
    return Loader(
        store,
        host,
        vfsmap.map,
        policy=policy,
        granularity=granularity,
        resident=run and host.user_space,
        on_violation=_Teller(log),
    )


class _Teller:
    """Prints the first few violations, and keeps all in a crash log, as lines of its pmsg zone."""

    def __init__(self, log: Path | None) -> None:
        self._left = _MOST_TOLD
        self._recorder = None if log is None else Recorder(log, watch=False)

    def __call__(self, violation: Violation) -> None:
        if self._recorder is not None:
            self._recorder.pmsg(f"{violation}\n")
        if self._left:
            self._left -= 1
            complain(str(violation))


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    elif rows:
        # build ids are told apart by their beginnings
        values = ([str(v)[:20] if k == "build_id" else v for k, v in r.items()] for r in rows)
        print_table(list(rows[0]), values)


def _print_change(overlaid: int, sites: int, as_json: bool) -> None:
    print_facts({"sites": sites, "overlaid_bytes": overlaid}, as_json=as_json)


def _print_reports(reports: list[Report]) -> None:
    print_table(
        ("image", "text", "in place", "copied", "laid over", "differing sites"),
        (
            [
                report.name,
                report.text,
                report.in_place,
                report.copied,
                report.overlaid,
                report.differing_sites,
            ]
            for report in reports
        ),
    )
    mapped = {report.name: page_sizes_text(report.page_sizes) for report in reports}
    for name, sizes in mapped.items():
        print(f"{name}: its pack's text is mapped by {sizes} pages")


def _print_survey(found: Survey) -> None:
    pages = found.text_pages
    print(
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
