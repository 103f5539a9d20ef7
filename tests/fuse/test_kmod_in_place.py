"""Modules and kernels bound to their host, mapped in place from a mounted pool."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vfsmap
from vfsmap.errors import Sealed
from vfsmap.guard import Policy, TextGuard
from vfsmap.kmod.bind import bind
from vfsmap.kmod.host import Host
from vfsmap.kmod.kernel import Kernel, bind_kernel
from vfsmap.kmod.layout import Area
from vfsmap.kmod.loader import Loader, forbid_stores
from vfsmap.kmod.module import Module
from vfsmap.kmod.pack import in_units, write_file
from vfsmap.kmod.plan import pokes_between
from vfsmap.kmod.runner import Runner
from vfsmap.kmod.store import Store
from vfsmap.kmod.subject import KernelSubject
from vfsmap.kmod.userspace import user_host
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.kernels import modules, vmlinuz
from vfsmap.testing.media import tmpfs
from vfsmap.units import KIB, MIB, PMD, PTE, Level

DATA = Path(__file__).parents[1] / "data" / "kmod"
PAGE = PTE.size


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="900M") as place, served_pool(place, "768M") as served:
        yield served


def host(profile: str) -> Host:
    return Host.open(DATA / profile / "host.json.xz")


@pytest.fixture(scope="module", params=["61", "612"])
def store(request: pytest.FixtureRequest, server: Server) -> Store:
    """A store with the nine modules and the kernel of a real boot, bound to it."""
    made = Store(server.directory / f"store-{request.param}")
    where = host(f"{request.param}max")
    made.add([Module.open(modules(request.param)[name]) for name in where.modules], where)
    made.add_kernel(vmlinuz(request.param).read_bytes(), where)
    return made


def key_of(store: Store) -> str:
    return store.directory.name.partition("-")[2]


@pytest.mark.parametrize("policy", ["refuse", "redirect"])
def test_on_its_host_no_page_is_written_and_text_is_mapped_by_huge_entries(
    store: Store, policy: Policy
) -> None:
    where = host(f"{key_of(store)}max")
    loader = Loader(store, where, vfsmap.map, policy=policy)
    for name in (*where.modules, "vmlinux"):
        loaded = loader.load(name)
        report = loader.report(loaded)
        assert loaded.guard.window.direct
        assert report.bound_here
        assert (report.overlaid, report.differing_sites) == (0, 0)
        assert report.page_sizes == {2 * MIB: loaded.guard.window.length, 4 * KIB: 0}
        if name != "vmlinux":
            bound = bind(Module.open(modules(key_of(store))[name]), where)
            assert loaded.text == bound.placed.area(Area.TEXT)
    loader.close()


def test_on_the_next_host_as_many_pages_are_laid_over_as_differ(store: Store) -> None:
    key = key_of(store)
    before, after = host(f"{key}max"), host(f"{key}off")
    loader = Loader(store, after, vfsmap.map, policy="redirect")
    kernel = Kernel.open(vmlinuz(key))
    for name in (*after.modules, "vmlinux"):
        loaded = loader.load(name)
        if name == "vmlinux":
            images = [bind_kernel(kernel, where)[0] for where in (before, after)]
            texts = [image.memory.read(image.text.start, len(image.text)) for image in images]
        else:
            found = [bind(Module.open(modules(key)[name]), where) for where in (before, after)]
            texts = [bound.placed.area(Area.TEXT) for bound in found]
        assert loaded.text == texts[1], name
        if before.modules.get(name, after.text) == after.modules.get(name, after.text):
            continue
        differing = sum(
            texts[0][at : at + PAGE] != texts[1][at : at + PAGE]
            for at in range(0, len(texts[0]), PAGE)
        )
        if len(texts[0]) == len(texts[1]):
            report = loader.report(loaded)
            assert report.overlaid == differing * PAGE, name
            assert report.in_place >= (-(-len(texts[0]) // PAGE) - differing) * PAGE
    loader.close()


def test_on_the_next_host_nothing_is_loaded_when_copies_are_refused(store: Store) -> None:
    seen: list[object] = []
    where = host(f"{key_of(store)}off")
    loader = Loader(store, where, vfsmap.map, policy="refuse", on_violation=seen.append)
    with pytest.raises(Sealed, match=r"xfs.* is persistent text and is never written"):
        loader.load("xfs")
    assert len(seen) > 100


@pytest.mark.parametrize(("key", "pages"), [("61", 2565), ("612", 3211)])
@pytest.mark.parametrize("granularity", [PTE, PMD])
def test_booting_a_kernel_that_was_not_bound_copies_what_a_real_boot_changed(
    server: Server, key: str, pages: int, granularity: Level
) -> None:
    kernel = Kernel.open(vmlinuz(key))
    subject = KernelSubject(kernel)
    image = kernel.image()
    raw = image.memory.read(image.text.start, len(image.text))
    start, content = in_units([(image.text.start, raw)], "text")
    path = server.directory / f"raw-{key}-{granularity}"
    write_file(path, content, start)

    with vfsmap.map(path, private=True, cow=granularity) as window:
        forbid_stores(window)
        guard = TextGuard(window, "redirect", granularity, base=start, name="vmlinux")
        assert window.page_sizes()[4 * KIB] == 0
        bound = subject.bind(host(f"{key}max"))
        with window.view() as view:
            text = view[: len(raw)]
            pokes = pokes_between("vmlinux", start, text, bound.text, bound.planned)
            text.release()
        guard.apply(pokes)
        with window.view() as view:
            assert view[: len(raw)] == bound.text
        assert guard.overlaid == (pages * PAGE if granularity == PTE else len(content))
    assert path.read_bytes() == content


def smaps(pid: int, start: int) -> dict[str, int]:
    """Return what the kernel says about the mapping at an address, in bytes."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = int(line.partition("-")[0], 16) == start
            if inside:
                found["executable"] = int(line.split()[1] == "r-xs")
        elif inside and (match := re.fullmatch(r"(\w+): +(\d+) kB", line)):
            found[match[1]] = int(match[2]) * KIB
    return found


def test_ten_processes_that_load_modules_add_no_text_memory(server: Server) -> None:
    names = ["crc7", "reed_solomon", "lz4_compress", "xfs"]
    path = server.directory / "runnable"
    Store(path).add([Module.open(modules("612")[name]) for name in names], Host(user_host()))
    runners: list[Runner] = []
    try:
        for _ in range(10):
            runners.append(Runner(path, names, vfsmap.map))
        for runner in runners:
            assert runner.call("crc7", "crc7_be", 0, b"123456789", 9).value == 0x75 << 1
        texts = [smaps(runner.pid, 0x4000_0000) for runner in runners]
        for text in texts:
            assert text["executable"]
            assert text["Rss"] == 2 * MIB
            assert text["Anonymous"] == 0
            assert text["ShmemPmdMapped"] == 2 * MIB
        assert sum(text["Pss"] for text in texts) <= 2 * MIB
    finally:
        for runner in runners:
            runner.close()


@pytest.mark.parametrize("granularity", [PTE, PMD])
def test_fifty_thousand_pokes_of_real_sites_are_copied_once_for_each_block(
    store: Store, granularity: Level
) -> None:
    where = host(f"{key_of(store)}max")
    loader = Loader(store, where, vfsmap.map, policy="redirect", granularity=granularity)
    count = 0
    before = {}
    for name in ("vmlinux", "xfs", "kvm"):
        loaded = loader.load(name)
        before[name] = loaded.text
        count += loader.trace(loaded, True)
        changed = sum(
            a != b
            for a, b in zip(
                *(
                    [text[at : at + PAGE] for at in range(0, len(text), PAGE)]
                    for text in (before[name], loaded.text)
                ),
                strict=True,
            )
        )
        assert changed > 50
        if granularity == PTE:
            assert loader.report(loaded).overlaid == changed * PAGE
        count += loader.trace(loaded, False)
        assert loaded.text == before[name]
    assert count > 50000
    assert store.verify(vfsmap.map) == {}
    loader.close()
