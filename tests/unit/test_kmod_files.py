"""Module files that are none, or lie: refused by an error that names what is wrong."""

import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from vfsmap.errors import Damaged, Denied, Invalid, NotFound, Unsupported, VfsmapError
from vfsmap.kmod.bind import bases_at, bind
from vfsmap.kmod.branches import CALL_DEPTH, RETHUNK, RETPOLINE, RETPOLINE_LFENCE
from vfsmap.kmod.derive import UNRET, mitigations, return_thunk, running_host
from vfsmap.kmod.host import Document, Host
from vfsmap.kmod.image import NEW, OLD
from vfsmap.kmod.layout import Layout
from vfsmap.kmod.module import Module, find_modules

DATA = Path(__file__).parents[1] / "data" / "kmod"
TEXT_AT = 0xFFFFFFFFC0000000
_NAMES = [
    "",
    ".text",
    ".rela.text",
    ".gnu.linkonce.this_module",
    ".modinfo",
    ".symtab",
    ".strtab",
    ".note.gnu.build-id",
    ".shstrtab",
    ".bss",
]


def build(
    *,
    text: bytes = b"\xe8\0\0\0\0\xc3",
    relocations: bytes | None = None,
    machine: int = 62,
    bits: int = 2,
    kind: int = 1,
    bss: int = 16,
    align: int = 16,
    vermagic: str = "6.1.0-test SMP mod_unload ",
    symbol_section: int = 0,
) -> bytes:
    """Return a small module: one function that calls ``outside``."""
    strings = b"\0outside\0inside\0"
    names = b"\0".join(name.encode() for name in _NAMES) + b"\0"
    if relocations is None:
        relocations = struct.pack("<QQq", 1, 1 << 32 | 4, -4)
    symbols = bytes(24)
    symbols += struct.pack("<IBBHQQ", 1, 0x10, 0, symbol_section, 0, 0)
    symbols += struct.pack("<IBBHQQ", 9, 0x12, 0, 1, 0, len(text))
    info = f"license=GPL\0vermagic={vermagic}\0depends=other-one,b\0alias=x\0alias=y\0".encode()
    this_module = bytes(24) + b"small".ljust(56, b"\0") + bytes(816)
    note = struct.pack("<III4s", 4, 4, 3, b"GNU\0") + b"\1\2\3\4"
    contents = [
        (0, 0, b"", 0, 0, 0, 0),
        (1, 6, text, 0, 0, align, 0),
        (4, 0x40, relocations, 5, 1, 8, 24),
        (1, 3, this_module, 0, 0, 64, 0),
        (1, 2, info, 0, 0, 1, 0),
        (2, 0, symbols, 6, 1, 8, 24),
        (3, 0, strings, 0, 0, 1, 0),
        (7, 2, note, 0, 0, 4, 0),
        (3, 0, names, 0, 0, 1, 0),
        (8, 3, b"", 0, 0, 8, 0),
    ]
    body, headers, at = b"", b"", 0
    for number, (what, flags, content, link, more, alignment, entry) in enumerate(contents):
        name = names.find(b"\0" + _NAMES[number].encode() + b"\0") + 1 if number else 0
        size = bss if what == 8 else len(content)
        headers += struct.pack(
            "<IIQQQQIIQQ", name, what, flags, 0, 64 + len(body), size, link, more, alignment, entry
        )
        body += content
        at += 1
    ident = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, at, 8
    )
    return header + body + headers


def host(**more: object) -> Host:
    symbols = {"outside": "0xffffffff81000000", "__fentry__": "0xffffffff81000100"}
    # too few, on purpose
    document = Document(kernel="6.1.0-test", x86_capability=[], kernel_symbols=symbols)  # type: ignore[arg-type]
    for name, value in more.items():
        setattr(document, name, value)
    return Host(document)


def bound(raw: bytes, where: Host | None = None) -> bytes:
    module = Module(raw, "small.ko")
    found = bind(module, where or host(), bases_at(TEXT_AT, Layout(module)))
    return found.placed.image.memory.read(TEXT_AT, 6)


def test_a_small_module_is_read_and_bound() -> None:
    module = Module(build(), "small.ko")
    assert module.name == "small"
    assert module.build_id == "01020304"
    assert module.depends == ["other-one", "b"]
    assert module.info["alias"] == ["x", "y"]
    assert module.imports == {"outside": False}
    assert module.function("inside").size == 6
    assert bound(build()).hex() == "e8fbffffc0c3"  # 0xffffffff81000000 - 0xffffffffc0000005


@pytest.mark.parametrize(
    "pack",
    [
        lzma.compress,
        lambda raw: gzip.compress(raw, mtime=0),
        lambda raw: zstandard.ZstdCompressor().compress(raw),
    ],
    ids=["xz", "gz", "zst"],
)
def test_packed_modules_are_the_same(pack: Callable[[bytes], bytes]) -> None:
    packed = pack(build())
    assert bound(packed) == bound(build())
    with pytest.raises(Damaged, match=r"small\.ko"):
        Module(packed[:-20], "small.ko")


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (b"", Damaged, "not an ELF file"),
        (b"#!/bin/sh\n" * 20, Damaged, "not an ELF file"),
        (build()[:63], Damaged, "not an ELF file"),
        (build()[:500], Damaged, "ends before its section table"),
        (build(machine=183), Unsupported, "machine 183 of 64 bits"),
        (build(bits=1), Unsupported, "machine 62 of 32 bits"),
        (build(kind=2), Damaged, "ELF file of type 2, not relocatable"),
        (build(align=3), Damaged, r"section \.text has the alignment 3"),
        (build(symbol_section=99), Damaged, "outside is in section 99"),
        (build(bss=1 << 60), Damaged, r"section \.bss has 1152921504606846976 bytes"),
        (build(align=8192), Damaged, r"section \.text wants to be aligned to 8192"),
        (build(relocations=bytes(25)), Damaged, r"relocations \.rela\.text make no sense"),
        (build(symbol_section=0xFFF2), Unsupported, "outside is a common symbol"),
        (
            build(vermagic="6.12.0 SMP"),
            Invalid,
            "built for kernel 6.12.0, the host runs 6.1.0-test",
        ),
    ],
)
def test_what_can_not_be_bound_is_named(raw: bytes, kind: type[VfsmapError], message: str) -> None:
    with pytest.raises(kind, match=message):
        bound(raw)


@pytest.mark.parametrize(
    ("offset", "info", "message"),
    [
        (1 << 40, 1 << 32 | 4, r"at \.text\+0x10000000000 is not zero, or outside"),
        (4, 1 << 32 | 4, r"at \.text\+0x4 is not zero, or outside"),
        (1, 1 << 32 | 99, "unknown type 99"),
        (1, 77 << 32 | 4, "names a symbol that is none"),
        (1, 1 << 32 | 10, r"the address of outside does not fit 32 bits at \.text\+0x1"),
    ],
)
def test_relocations_that_reach_out_are_named(offset: int, info: int, message: str) -> None:
    with pytest.raises(Damaged, match=message):
        bound(build(relocations=struct.pack("<QQq", offset, info, 0)))


def test_missing_symbols_are_named() -> None:
    with pytest.raises(NotFound, match=r"the host supplies no outside \(1 missing\)"):
        bound(build(), host(kernel_symbols={}))


@pytest.mark.parametrize("cut", range(0, 4000, 97))
def test_a_truncated_module_is_refused_at_any_length(cut: int) -> None:
    raw = build()
    with pytest.raises(VfsmapError):
        bound(raw[: min(cut, len(raw) - 1)])


def test_a_signature_is_read_and_a_cut_one_is_refused() -> None:
    trailer = struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, 5) + b"~Module signature appended~\n"
    signed = Module(build() + b"abcde" + trailer, "small.ko")
    assert signed.signature is not None
    assert signed.signature.content == b"abcde"
    assert signed.signature.id_type == 2
    with pytest.raises(Damaged, match="a signature of 4294967295 bytes"):
        Module(build() + trailer.replace(b"\0\0\0\5~", b"\xff\xff\xff\xff~"), "small.ko")


def test_a_directory_without_modules_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no module"):
        find_modules(tmp_path)


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (b"", Damaged, "host"),
        (b"{}", Damaged, "missing required field `kernel`"),
        (b'{"kernel": "6", "x86_capability": [1, "x"]}', Damaged, "Expected `int`"),
        (b'{"kernel": "6", "x86_capability": [4294967296]}', Invalid, "24 words of 32 bits"),
        (
            b'{"kernel": "6", "x86_capability": [], "kernel_text_va": "zz"}',
            Invalid,
            "'zz' is no address",
        ),
        (
            b'{"kernel": "6", "x86_capability": [], "pv_ops": ["0x1ffffffffffffffff"]}',
            Invalid,
            "does not fit 64 bits",
        ),
        (b'{"kernel": "\xff", "x86_capability": []}', Damaged, "can't decode byte"),
        (b"[" * 100000, Damaged, "Expected `object`"),
        (
            b'{"kernel": "6", "x86_capability": [], "vmlinux_text_len": -7}',
            Invalid,
            r"host\.json: vmlinux_text_len: no text has -7 bytes",
        ),
        (
            b'{"kernel": "6", "x86_capability": [], "modules": {"a": {"text_len": 9999999999}}}',
            Invalid,
            r"modules\.a\.text_len: no text has 9999999999 bytes",
        ),
    ],
)
def test_documents_that_make_no_sense_are_refused(
    raw: bytes, kind: type[VfsmapError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Host.decode(raw, "host.json")


def test_a_document_survives_being_written_and_read() -> None:
    where = host(pv_ops=["0xffffffff81000000"], call_depth=True)
    again = Host.decode(where.encode())
    assert again.document == where.document
    assert again.profile == where.profile
    assert json.loads(where.encode())["kernel"] == "6.1.0-test"


def test_the_running_kernel_is_described_as_far_as_it_can_be_seen(tmp_path: Path) -> None:
    places = {
        "proc/kallsyms": (
            "ffffffff81000000 T _text\nffffffff82000000 T _etext\n"
            "ffffffff81e00000 T __x86_return_thunk\nffffffff81000010 t local\n"
            "ffffffffc0001000 T helper\t[small]\n"
        ),
        "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu rep_good smap nopl\n",
        "proc/sys/kernel/osrelease": "6.1.0-test\n",
        "proc/cmdline": "quiet\n",
        "sys/devices/system/cpu/vulnerabilities/spectre_v2": "Mitigation: Retpolines\n",
        "sys/module/small/sections/.text": "0xffffffffc0001000\n",
    }
    for name, content in places.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    found = Host(running_host(tmp_path))
    assert found.release == "6.1.0-test"
    assert found.text == range(0xFFFFFFFF81000000, 0xFFFFFFFF82000000)
    assert found.has(3 * 32 + 16)  # rep_good
    assert found.has(11 * 32 + 12)  # retpolines
    assert found.return_thunk == 0xFFFFFFFF81E00000
    assert "local" not in found.symbols
    assert found.modules["small"].sections[".text"] == 0xFFFFFFFFC0001000
    assert found.import_of("other", "helper") == 0xFFFFFFFFC0001000
    (tmp_path / "proc/kallsyms").write_text("0000000000000000 T _text\n")
    with pytest.raises(Denied, match="kptr_restrict"):
        running_host(tmp_path)


@pytest.mark.parametrize(
    ("line", "features"),
    [
        ("spectre_v2:Mitigation: Retpolines; IBPB", {11 * 32 + 12}),
        ("spectre_v2:Vulnerable: LFENCE", {11 * 32 + 12, 11 * 32 + 13}),
        ("spectre_v2:Vulnerable", set()),
        ("retbleed:Mitigation: untrained return thunk; SMT", {11 * 32 + 14, 11 * 32 + 15}),
        ("retbleed:Mitigation: Stuffing", {11 * 32 + 14, 11 * 32 + 19}),
        ("spec_rstack_overflow:Mitigation: Safe RET", {11 * 32 + 14}),
        (
            "indirect_target_selection:Mitigation: Aligned branch/return thunks",
            {11 * 32 + 14, 21 * 32 + 5, 21 * 32 + 6},
        ),
    ],
)
def test_mitigations_are_read_from_what_the_kernel_says(line: str, features: set[int]) -> None:
    assert mitigations([line]) == features


@pytest.mark.parametrize(
    "path", sorted(DATA.rglob("*.json.xz")), ids=lambda p: str(p.relative_to(DATA))
)
def test_what_a_kernel_says_of_its_mitigations_is_what_it_has_done(path: Path) -> None:
    where = Host.open(path)
    dialect = NEW if where.release.startswith("6.12") else OLD
    wanted = (RETPOLINE, RETPOLINE_LFENCE, RETHUNK, UNRET, CALL_DEPTH, dialect.its_feature)
    said = mitigations(where.document.vulnerabilities)
    assert {bit for bit in wanted if bit in said} == {bit for bit in wanted if where.has(bit)}
    assert return_thunk(where.document.vulnerabilities, where.symbols) == where.return_thunk
