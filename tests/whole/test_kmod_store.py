"""The image store: variants side by side, addresses, damage, and the commands over it."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vfsmap as library
from vfsmap.errors import Damaged, Exists, Invalid, NotFound
from vfsmap.kmod.bind import bind
from vfsmap.kmod.branches import CALL, JUMP, RETPOLINE
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import NEW, RETPOLINES
from vfsmap.kmod.layout import Area
from vfsmap.kmod.loader import Loader
from vfsmap.kmod.module import Module
from vfsmap.kmod.runner import Runner
from vfsmap.kmod.store import Store
from vfsmap.kmod.tables import offsets
from vfsmap.kmod.userspace import user_host
from vfsmap.testing.commands import vfsmap
from vfsmap.testing.kernels import modules
from vfsmap.units import MIB

DATA = Path(__file__).parents[1] / "data" / "kmod"


def host(profile: str) -> Host:
    return Host.open(DATA / profile / "host.json.xz")


def module(name: str, key: str = "61") -> Module:
    return Module.open(modules(key)[name])


def test_variants_of_a_module_live_side_by_side_and_each_host_gets_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for profile in ("61max", "61off", "61up"):
        store.add([module("xfs")], host(profile))
    assert len(Store(tmp_path).find("xfs")) == 3
    assert len({variant.profile for variant in store.index.variants}) == 3
    for profile in ("61up", "61off", "61max"):
        where = host(profile)
        loader = Loader(Store(tmp_path), where, library.map)
        loaded = loader.load("xfs")
        assert loader.report(loaded).bound_here
        assert loaded.text == bind(module("xfs"), where).placed.area(Area.TEXT)
        loader.close()


def test_modules_of_kernels_and_of_processes_share_a_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add([module("xfs")], host("61max"))
    (here,) = store.add([module("crc7")], Host(user_host()))
    assert here.text.start == 0x4000_0000


def test_a_module_can_be_bound_to_several_addresses_of_one_host(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (first,) = store.add([module("crc7")], Host(user_host()))
    (second,) = store.add([module("crc7")], Host(user_host()), at=0x5000_0000)
    with pytest.raises(Exists, match="holds crc7 at 0x50000000"):
        store.add([module("crc7")], Host(user_host()), at=0x5000_0000)
    with pytest.raises(Exists, match="holds crc7 at 0x50000000"):
        store.add([module("reed_solomon")], Host(user_host()), at=0x5000_0000)
    assert store.find("crc7@0x50000000") == [second]
    assert store.find("crc7@0x40000000") == [first]
    with pytest.raises(NotFound, match="no crc7 bound to 0x60000000"):
        store.find("crc7@0x60000000")
    for name, variant in (("crc7", first), ("crc7@0x50000000", second)):
        with Runner(tmp_path, [name], library.map) as run:
            assert run.address_of(name, "crc7_be") == variant.text.start
            assert run.call(name, "crc7_be", 0, b"123456789", 9).value == 0x75 << 1


def test_a_module_brings_its_pages_of_thunks_where_the_store_chooses_its_place(
    tmp_path: Path,
) -> None:
    document = user_host()
    document.x86_capability[NEW.its_feature >> 5] |= 1 << (NEW.its_feature & 31)
    store, where = Store(tmp_path), Host(document)
    names = ("xfs", "reed_solomon")
    for variant in store.add([module(name, "612") for name in names], where):
        loader = Loader(store, where, library.map)
        start = variant.text.start
        text = loader.load(variant.name).text
        branches = 0
        for at in offsets(store.placed(variant).image, RETPOLINES):
            code = text[at - start : at - start + 5]
            if at not in variant.text or code[0] not in (CALL, JUMP):
                continue
            target = at + 5 + int.from_bytes(code[1:], "little", signed=True)
            branches += target & ~0xFFF in variant.thunk_pages
        assert (branches > 0) == bool(variant.thunk_pages)
        guard = loader.load(variant.name).guard
        with guard.window.view() as view:
            for page in variant.thunk_pages:
                assert page >= variant.text.stop
                lines = view[page - guard.base : page - guard.base + 4096]
                assert lines[:32].tobytes() == b"\xcc" * 32
                assert lines[32] in (0x41, 0xFF)
                lines.release()
        loader.close()
    assert store.find("xfs")[0].thunk_pages
    with pytest.raises(Exists, match="holds xfs at"):
        store.add([module("crc7", "612")], where, at=store.find("xfs")[0].text.start)


def test_a_loaded_module_needs_its_pages_of_thunks_in_the_document() -> None:
    where = host("612max")
    document = where.document
    document.x86_capability[RETPOLINE >> 5] &= ~(1 << (RETPOLINE & 31))
    document.x86_capability[NEW.its_feature >> 5] |= 1 << (NEW.its_feature & 31)
    with pytest.raises(NotFound, match=r"xfs\.ko.* needs more than 0 .*modules\.NAME\.its_pages"):
        bind(module("xfs", "612"), Host(document))
    pages = [0xFFFFFFFFC0F00000 + n * 4096 for n in range(8)]
    document.modules["xfs"].its_pages = [hex(page) for page in pages]
    bound = bind(module("xfs", "612"), Host(document))
    assert [page.start for page in bound.thunk_pages] == pages[: len(bound.thunk_pages)]
    assert bound.thunk_pages


def test_modules_share_units_and_never_addresses(tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = ("crc7", "crc_itu_t", "lz4_compress", "xfs")
    first = store.add([module(name) for name in names], Host(user_host()))
    second = store.add([module("reed_solomon")], Host(user_host()))
    spans = [
        range(base, base + variant.sizes[area])
        for variant in (*first, *second)
        for area, base in variant.bases.items()
        if area != "percpu" and variant.sizes[area]
    ]
    spans.sort(key=lambda span: span.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(spans))
    assert all(span.start % 4096 == 0 for span in spans)
    assert {variant.text.start // (2 * MIB) for variant in first} == {0x40000000 // (2 * MIB)}
    assert second[0].text.start % (2 * MIB) == 0
    assert all(span.stop < 1 << 31 for span in spans)


def test_a_module_that_another_one_needs_is_bound_to_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    needed = module("cast_common")
    store.add([module("cast5_generic"), needed], Host(user_host()))
    exported = store.placed(store.find("cast_common")[0]).address_of_symbol("cast_s1")
    placed = store.placed(store.find("cast5_generic")[0])
    values = zip(placed.module.elf.symbols, placed.values, strict=True)
    assert next(value for symbol, value in values if symbol.name == "cast_s1") == exported
    # and so is one that comes later
    later = store.add([module("cast6_generic")], Host(user_host()))[0]
    placed = store.placed(later)
    values = zip(placed.module.elf.symbols, placed.values, strict=True)
    assert next(value for symbol, value in values if symbol.name == "cast_s1") == exported


def test_adding_twice_and_adding_what_fails_leave_the_store_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add([module("xfs")], host("61max"))
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(Exists, match="xfs bound to that host already"):
        store.add([module("xfs")], host("61max"))
    with pytest.raises(Invalid, match=r"was built for kernel 6\.12"):
        Store(tmp_path).add([module("xfs", "612")], host("61off"))
    with pytest.raises(Invalid, match="not on a unit of 2 MiB"):
        Store(tmp_path).add([module("kvm")], host("61max"), at=0xFFFFFFFFC0001000)
    with pytest.raises(NotFound, match="holds no module kvm, but xfs"):
        Store(tmp_path).find("kvm")
    assert (tmp_path / "index.json").read_bytes() == before


def test_what_an_interrupted_add_left_is_no_hindrance(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (variant,) = store.add([module("crc7")], Host(user_host()))
    (tmp_path / "index.json").unlink()  # as if power had failed just before the commit point
    again = Store(tmp_path)
    assert again.index.variants == []
    assert again.add([module("crc7")], Host(user_host())) == [variant]
    assert again.verify(library.map) == {}


def test_damage_is_named_by_file_and_block_and_refused_at_load(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (variant,) = store.add([module("reed_solomon")], Host(user_host()))
    path = store.file(variant.pack, "text")
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[4096 + 5] ^= 1
    path.write_bytes(raw)
    assert store.verify(library.map) == {f"packs/{variant.pack}/text.img": [1]}
    with pytest.raises(Damaged, match="blocks 1 differ"):
        Loader(store, Host(user_host()), library.map).load("reed_solomon")
    path.write_bytes(raw[:4096])
    with pytest.raises(Damaged, match="4096 bytes, 2097152 were sealed"):
        Loader(store, Host(user_host()), library.map).load("reed_solomon")


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 2}', b'{"variants": [{"name": 1}]}'])
def test_an_index_that_makes_no_sense_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"index\.json"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda index: index["packs"].clear(), "crc7 is in the pack"),
        (lambda index: [p["files"].pop("text") for p in index["packs"].values()], "no file text"),
        (
            lambda index: [p["files"]["data"].update(size=-1) for p in index["packs"].values()],
            "no file data",
        ),
        (lambda index: index["variants"][0]["bases"].pop("text"), "area text"),
        (lambda index: index["variants"][0]["sizes"].pop("data"), "area data"),
        (lambda index: index["variants"][0]["sizes"].update(text=1 << 40), "area text"),
        (lambda index: index["variants"][0]["bases"].update(text=-4096), "area text"),
        (lambda index: index["variants"][0]["bases"].update(other=0), "area other"),
        (lambda index: index["variants"][0]["offsets"].clear(), "its data is nowhere"),
        (lambda index: index["variants"][0]["offsets"].update(data=-1), "its data is nowhere"),
    ],
    ids=["packs", "file", "size", "base", "no size", "large", "low", "area", "offsets", "offset"],
)
def test_an_index_whose_numbers_can_not_be_is_damage(
    tmp_path: Path, spoil: Callable[[Any], object], message: str
) -> None:
    Store(tmp_path).add([module("crc7")], Host(user_host()))
    path = tmp_path / "index.json"
    index = json.loads(path.read_bytes())
    spoil(index)
    path.write_text(json.dumps(index))
    with pytest.raises(Damaged, match=rf"index\.json: .*{message}"):
        Store(tmp_path)


def test_a_hosts_document_that_has_changed_or_is_gone_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (variant,) = store.add([module("crc7")], Host(user_host()))
    path = tmp_path / "hosts" / f"{variant.host}.json"
    path.write_bytes(path.read_bytes().replace(b"user space", b"outer space"))
    with pytest.raises(Damaged, match="has changed since crc7 was added"):
        store.host(variant)
    path.unlink()
    with pytest.raises(Damaged, match="No such file"):
        store.host(variant)


def test_a_source_that_has_changed_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (variant,) = store.add([module("crc7")], Host(user_host()))
    path = tmp_path / "sources" / variant.source
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(Damaged, match="has changed since crc7 was added"):
        store.module(variant)


def test_the_commands_tell_what_they_did(tmp_path: Path) -> None:
    store, document = tmp_path / "store", tmp_path / "user.json"
    vfsmap("module", "host", "--user", "-o", document)
    added = json.loads(
        vfsmap(
            "module",
            "add",
            modules("61")["crc7"],
            modules("61")["xfs"],
            store,
            "--host",
            document,
            "--json",
        ).stdout
    )
    assert [row["module"] for row in added] == ["crc7", "xfs"]
    listed = json.loads(vfsmap("module", "ls", store, "--json").stdout)
    assert [row["kernel"] for row in listed] == ["user space"] * 2
    called = json.loads(
        vfsmap(
            "module", "call", store, "crc7", "crc7_be", "0", "text:123456789", "9", "--json"
        ).stdout
    )
    assert called["value"] == 0x75 << 1
    (report,) = json.loads(vfsmap("module", "load", store, "xfs", "--json").stdout)
    assert report["overlaid"] == 0
    traced = json.loads(vfsmap("module", "trace", store, "xfs", "on", "--json").stdout)
    assert traced["sites"] == 2629  # those of init text are not there any more
    keys = json.loads(vfsmap("module", "toggle", store, "xfs", "--json").stdout)
    name = next(row["key"] for row in keys if "xfs_buf_init" in row["key"])
    toggled = json.loads(vfsmap("module", "toggle", store, "xfs", name, "on", "--json").stdout)
    assert toggled["sites"] >= 1
    assert toggled["overlaid_bytes"] >= 4096
    assert vfsmap("module", "verify", store).stdout.count("sha256:") == 3


def test_images_stay_loaded_until_interrupted(tmp_path: Path) -> None:
    store = tmp_path / "store"
    Store(store).add([module("crc7"), module("reed_solomon")], Host(user_host()))
    command = [sys.executable, "-m", "vfsmap_tools.cli", "module", "load", str(store), "crc7"]
    command += ["--hold", "--policy", "refuse"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
        assert running.stderr is not None
        assert b"loaded in process" in running.stderr.readline()
        maps = Path(f"/proc/{running.pid}/maps").read_text()
        assert re.search(r"^40000000-40200000 r-xs .*/text\.img$", maps, re.MULTILINE)
        running.terminate()
    assert running.returncode == 0


def test_a_module_is_bound_to_what_was_there_not_to_what_came_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add([module("cast5_generic")], Host(user_host()))
    before = store.placed(store.find("cast5_generic")[0]).values
    store.add([module("cast_common")], Host(user_host()))
    assert store.placed(store.find("cast5_generic")[0]).values == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("load", "STORE", "nothing"), 1, "holds no module nothing"),
        (("call", "STORE", "crc7", "nothing"), 1, "no symbol 'nothing'"),
        (("call", "STORE", "crc7", "crc7_be", "zz"), 2, "argument 'zz'"),
        (("trace", "STORE", "reed_solomon", "on", "--policy", "refuse"), 1, "never written"),
        (("trace", "STORE", "reed_solomon", "on", "--policy", "refuse"), 1, " of reed_solomon: e8"),
        (("toggle", "STORE", "crc7", "zz", "on"), 2, "'zz' is no address"),
        (("toggle", "STORE", "crc7", "zz"), 2, "shall zz be on or off?"),
        (("ls", "STORE/nothing"), 1, "is no store; make one"),
        (("sites",), 2, "name a file, or a directory"),
        (("sites", "--all", "STORE/sources"), 1, "no module (*.ko, packed or not) below"),
        (("ls", "STORE/packs"), 1, "is no store; make one"),
        (("verify", "STORE/packs"), 1, "is no store; make one"),
        (("load", "STORE", "@0x40000000"), 2, "an image without a name"),
        (("load", "STORE", "crc7@zz"), 2, "'zz' is no address"),
        (("trace", "STORE", "crc7"), 2, "Missing argument '{on|off}'. Choose from: on, off"),
        (("add", "CRC7", "CRC7", "STORE/new"), 2, "crc7 is given twice"),
        (("add", "CRC7", "STORE/new", "--at", "0"), 2, "0x0 to 0x"),
        (("add", "CRC7", "STORE/new", "--at", "0xffffffff81000000"), 2, "can be reached at"),
        (("text", "CRC7", "--host", "HOST", "-o", "OUT", "--at", "-4096"), 2, "64 bits"),
        (("call", "STORE", "crc7", "crc7_be", "-1", "zeros:1T"), 1, "is larger than 64M"),
        (("call", "STORE", "crc7", "crc7_be", "0", "file:/dev/zero"), 1, "is larger than 64M"),
        (("call", "STORE", "crc7", "crc7_be", str(1 << 64)), 2, "a number of 64 bits, hex:"),
        (("call", "STORE", "crc7", "crc7_be", "--nothing"), 2, "argument '--nothing'"),
        (("call", "STORE", "crc7", "__this_module"), 2, "is not in the text of crc7"),
        (("call", "STORE", "crc7", "crc7_be", "0", "8", "9"), 1, "ended the child by SIGSEGV"),
        (("text", "STORE/index.json", "--host", "HOST", "-o", "OUT"), 3, "not an ELF file"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    store = tmp_path / "store"
    Store(store).add([module("crc7"), module("reed_solomon")], Host(user_host()))
    names = {
        "HOST": DATA / "61max" / "host.json.xz",
        "OUT": tmp_path / "out",
        "CRC7": modules("61")["crc7"],
    }
    words = [str(names.get(a, a)).replace("STORE", str(store)) for a in arguments]
    done = vfsmap("module", *words, check=False)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("profile", ["61max", "612off"])
def test_the_text_command_writes_what_the_kernel_had_in_memory(
    tmp_path: Path, profile: str
) -> None:
    path, output = DATA / profile / "host.json.xz", tmp_path / "text"
    key = "612" if profile.startswith("612") else "61"
    facts = json.loads(
        vfsmap("module", "text", modules(key)["kvm"], "--host", path, "-o", output, "--json").stdout
    )
    resident = host(profile).modules["kvm"]
    assert int(facts["text_base"], 16) == resident.text.start
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    assert digest == resident.document.text_sha256
