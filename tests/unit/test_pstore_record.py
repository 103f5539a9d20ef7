import random
import zlib

import lz4.block
import lzallright
import pytest
import zstandard

from vfsmap.pstore.compress import deflate, inflate
from vfsmap.pstore.ftrace import Call, format_calls, merge, pack_calls, parse_calls
from vfsmap.pstore.kallsyms import Symbols
from vfsmap.pstore.record import (
    make_body,
    make_header,
    parse_header,
    parse_title,
    readable_limit,
)

TEXT = b"Panic#7 Part1\n" + b"".join(b"<6>[%9d.0] line of the log\n" % n for n in range(900))


def test_header_is_the_kernels() -> None:
    assert make_header(1795423308788279999, compressed=True) == b"====1795423308.788279-C\n"
    assert make_header(5_000_000_000, compressed=False) == b"====5.000000-D\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [  # what the kernel's sscanf takes
        (b"====1795423308.788279-C\n\xacU", (1795423308788279000, True, 24)),
        (b"====12.000001-D\nOops#1", (12000001000, False, 16)),
        (b"====12.000001\nOops#1", (12000001000, False, 14)),
        (b"====12.5\n", (12000005000, False, 9)),
        (b"====-3.0-D\n", (-3000000000, False, 11)),
        (b"====1.2-X\nbody", (1000002000, False, 10)),
        (b"====1.2-C \n\xa0\x0b!", (1000002000, True, 13)),
        (b"====1.2-Cbody", (1000002000, True, 9)),
        (b"==== 1. 2body", (1000002000, False, 9)),
        (b"====1.2-\0", (1000002000, False, 7)),
    ],
)
def test_header_is_parsed_as_the_kernel_parses_it(
    log: bytes, expected: tuple[int, bool, int]
) -> None:
    assert parse_header(log) == expected


@pytest.mark.parametrize(
    "log", [b"", b"===1.0-C\n", b"====x.0\n", b"====1,0\n", b"====1.\n", b"====+1.0", b"text"]
)
def test_what_is_no_header_is_none(log: bytes) -> None:
    assert parse_header(log) is None


def test_title_tells_reason_and_number() -> None:
    assert parse_title(b"Oops#12 Part1\n<6>") == ("Oops", 12)
    assert parse_title(b"Whoops#12 Part1\n") is None


def test_kernels_of_every_compression_are_inflated() -> None:
    raw = zlib.compressobj(6, zlib.DEFLATED, -11, 8)
    packed = {
        "deflate 2^15": deflate(TEXT),
        "deflate 2^11": raw.compress(TEXT) + raw.flush(),
        "zstd": zstandard.ZstdCompressor().compress(TEXT),
        "zstd without size": zstandard.ZstdCompressor(write_content_size=False).compress(TEXT),
        "lz4": lz4.block.compress(TEXT, store_size=False),
        "lz4hc": lz4.block.compress(TEXT, mode="high_compression", store_size=False),
        "lzo": bytes(lzallright.LZOCompressor().compress(TEXT)),
    }
    assert {name: inflate(body, 3 * len(TEXT)) for name, body in packed.items()} == dict.fromkeys(
        packed, TEXT
    )


def test_cut_or_foreign_body_is_not_inflated() -> None:
    for body in (deflate(TEXT)[:-3], lz4.block.compress(TEXT, store_size=False)[:-9], b"", b"\0"):
        assert inflate(body, 1 << 20) is None


def test_text_longer_than_the_limit_is_not_inflated() -> None:
    bomb = b"Oops#1 Part1\n" + bytes(1 << 20)
    for packed in (
        deflate(bomb),
        zstandard.compress(bomb),
        lz4.block.compress(bomb, store_size=False),
    ):
        assert inflate(packed, len(bomb)) == bomb
        assert inflate(packed, len(bomb) - 1) is None


@pytest.mark.parametrize("room", [300, 1000, 4000, 1 << 17])
def test_body_fits_and_holds_the_end_of_the_log(room: int) -> None:
    for compression, expected in (("deflate", True), ("none", False)):
        body, packed = make_body(b"Oops#1 Part1\n", TEXT, room, room * 5 // 3, compression)  # type: ignore[arg-type]
        text = inflate(body, 1 << 20) if packed else body
        assert packed is expected
        assert len(body) <= room
        assert text is not None
        assert len(text) <= room * 5 // 3
        title, tail = text[:13], text[13:]
        assert title == b"Oops#1 Part1\n"
        assert TEXT.endswith(tail)
        assert tail.startswith((b"<6>", b"Panic#7"))
        assert len(tail) >= min(len(TEXT), room // 2 - 60)


def test_of_a_log_that_does_not_compress_as_much_is_kept_as_fits() -> None:
    noise = random.Random(1).randbytes(5000)
    body, packed = make_body(b"Oops#1 Part1\n", noise, 1000, 5000, "deflate")
    text = inflate(body, 5000) if packed else body
    assert text is not None
    assert noise.endswith(text[13:])
    assert len(text) > 500


def test_body_in_no_room_at_all_is_cut() -> None:
    assert make_body(b"Oops#1 Part1\n", TEXT, 5, 8, "deflate") == (b"Oops#", False)


def test_calls_are_merged_like_the_kernel_merges_zones() -> None:
    first, second = [Call(1, 1, 5 << 8), Call(2, 2, 7 << 8)], [Call(3, 3, 5 << 8 | 1)]
    assert [call.ip for call in merge([first, [], second])] == [3, 1, 2]


def test_record_cut_by_the_ring_is_left_out() -> None:
    calls = [Call(1, 2, 3), Call(4, 5, 6)]
    assert parse_calls(b"cut" + pack_calls(calls)) == calls


def test_calls_are_shown_with_symbols_of_kernel_and_modules() -> None:
    symbols = Symbols.parse(
        "ffffffff81000000 T start\nffffffff81000000 T alias\nffffffff81000100 t next\n"
        "ffffffffc0000000 t probe\t[ramoops]\nffffffffc0000040 d last\t[ramoops]\n"
    )
    calls = [Call(0xFFFFFFFF81000000, 0xFFFFFFFFC0000012, 77 << 8 | 3), Call(0x10, 0, 0)]
    assert format_calls(calls, symbols) == (
        b"CPU:3 ts:77 ffffffff81000000  ffffffffc0000012  start <- probe+0x12/0x40 [ramoops]\n"
        b"CPU:0 ts:0 00000010  00000000  0x10 <- 0x0\n"
    )


def test_what_follows_a_whole_stream_is_ignored_as_kernels_do() -> None:
    text = b"Oops#1 Part1\nshort\n"
    assert inflate(deflate(text) + b"rubbish", 1000) == text


def test_stream_without_its_last_zero_is_forgiven_where_the_kernel_does() -> None:
    text = next(
        text
        for text in (b"Oops#1 Part1\n" + b"x" * n + b"%d" % n for n in range(1000))
        if deflate(text).endswith(b"\0")
    )
    torn = deflate(text)[:-1]
    assert inflate(torn, 5000) is None
    assert inflate(torn, 5000, lenient=True) == text


def test_longest_text_is_the_kernels() -> None:
    assert readable_limit(131060, "6.12") == 393180
    assert readable_limit(131060, "6.1") == 218433
    assert readable_limit(8180, "6.1") == 18177
    assert readable_limit(1500, "6.1") == 2678
