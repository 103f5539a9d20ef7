"""``vfsmap module load``, ``call``, ``toggle``, ``trace``: images of a store, mapped and used."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import vfsmap
from vfsmap.errors import Invalid, Unsupported
from vfsmap.guard import Policy, Violation
from vfsmap.kmod.host import Host, number
from vfsmap.kmod.loader import Loader, Report
from vfsmap.kmod.runner import Runner
from vfsmap.kmod.store import Store
from vfsmap.pstore import Recorder
from vfsmap.units import Level, format_size, parse_size
from vfsmap_tools.console import (
    complain,
    errors_exit,
    json_option,
    page_sizes_text,
    print_facts,
    print_json,
    print_line,
    print_table,
)
from vfsmap_tools.module_options import (
    PATH,
    existing,
    granularity_option,
    host_option,
    pmsg_option,
    policy_option,
    print_rows,
)

_MOST_TOLD = 3
_LARGEST = 64 << 20


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say for whom, and how guarded, images are loaded."""
    for option in (pmsg_option, granularity_option, policy_option, host_option):
        command = option(command)
    return command


@click.command("load")
@click.argument("store", type=PATH, metavar="DST")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@_guarded
@click.option("--hold", is_flag=True, help="Keep them loaded until interrupted.")
@json_option
@errors_exit
def load(
    store: Path,
    images: tuple[str, ...],
    hold: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Load images for a host, and tell what was mapped in place, copied and laid over.

    Without --host they are loaded for the host that they were bound to.  Images for user space are
    put at their own addresses, where their text can run.
    """
    loader = _loader(existing(store), images[0], run=True, **how)
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


@click.command("call", context_settings={"ignore_unknown_options": True})  # of -1, say
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
            number = int(text, 0)
            if -(1 << 63) <= number < 1 << 64:
                return number
        if kind == "hex":
            return bytes.fromhex(rest)
        if kind == "text":
            return rest.encode()
        if kind == "file":
            with Path(rest).open("rb") as stream:
                return _bounded(stream.read(_LARGEST + 1), text)
        if kind == "zeros":
            size = int(rest, 0) if rest.startswith("0x") else parse_size(rest)
            return _bounded(bytes(min(size, _LARGEST + 1)), text)
    except ValueError:
        pass
    known = "a number of 64 bits, hex:..., text:..., file:... or zeros:SIZE"
    raise Invalid(f"argument {text!r}: {known} is expected")


def _bounded(content: bytes, text: str) -> bytes:
    if len(content) > _LARGEST:
        raise Unsupported(f"argument {text!r} is larger than {format_size(_LARGEST)}")
    return content


@click.command("toggle")
@click.argument("store", type=PATH, metavar="DST")
@click.argument("image")
@click.argument("key", required=False)
@click.argument("state", type=click.Choice(["on", "off"]), required=False)
@_guarded
@json_option
@errors_exit
def toggle(
    store: Path,
    image: str,
    key: str | None,
    state: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Switch the jump labels of a key on or off, through the guard.

    This is done in a process of its own, and tells what it takes.  KEY is a name or an address;
    without one, the image's keys are listed.
    """
    loader = _loader(existing(store), image, **how)
    loaded = loader.load(image)
    keys = loaded.subject.keys()
    if key is None:
        if not keys:
            complain(f"{image} has no jump labels, and so no keys")
        print_rows([{"key": name, "address": f"{a:#x}"} for name, a in keys.items()], as_json)
        return
    if state is None:
        raise Invalid(f"shall {key} be on or off?")
    address = keys[key] if key in keys else number(key)
    count = loader.toggle(loaded, address, state == "on")
    _print_change(loaded.guard.overlaid, count, as_json)


@click.command("trace")
@click.argument("store", type=PATH, metavar="DST")
@click.argument("image")
@click.argument("state", type=click.Choice(["on", "off"]))
@_guarded
@json_option
@errors_exit
def trace(
    store: Path,
    image: str,
    state: str,
    as_json: bool,
    **how: Any,
) -> None:
    """Let each function of an image call the tracer, or leave it alone, through the guard.

    This is done in a process of its own, and tells what it takes.
    """
    loader = _loader(existing(store), image, **how)
    loaded = loader.load(image)
    count = loader.trace(loaded, state == "on")
    _print_change(loaded.guard.overlaid, count, as_json)


def _loader(
    store: Store,
    image: str,
    *,
    host_path: Path | None,
    policy: Policy,
    granularity: Level,
    log: Path | None,
    run: bool = False,
) -> Loader:
    """Return a loader for the host of a store's image; what is told comes from `_guarded`."""
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
        print_line(f"{name}: its pack's text is mapped by {sizes} pages")
