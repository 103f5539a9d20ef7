import pytest

from vfsmap.errors import Invalid
from vfsmap.pstore.ecc import Code, matching_sizes

HEADER = bytes.fromhex("444247430000000000000000")


@pytest.mark.parametrize(
    ("data", "parity"),
    [  # from the zones of real kernels
        (HEADER, "aa25d52132e2353a385519c02bcbad5f"),
        (bytes.fromhex("314e41430000000000000000"), "563addd8b2da230d492eb150070779ad"),
        (bytes.fromhex("844341430000000000000000"), "bf2675c2821230f896c1f0e4b3b414e3"),
        (bytes(range(128)), "1c426d22fb8ad3fa2eeeae521c329ac1"),
        (b"a" * 52, "d30caedd50e4434c7234f8677967a474"),
        (bytes(128), "00" * 16),
    ],
)
def test_parity_of_16_is_the_kernels(data: bytes, parity: str) -> None:
    assert Code(16).parity(data) == bytes.fromhex(parity)


def test_parities_of_several_blocks_are_those_of_each_block() -> None:
    code = Code(16)
    data = bytes(range(200)) + bytes(100)
    assert code.parities(data) == b"".join(
        code.parity(part) for part in (data[:128], data[128:256], data[256:])
    )


@pytest.mark.parametrize("size", [0, 1, 128, -3])
def test_parity_size_that_gives_no_codeword_is_refused(size: int) -> None:
    with pytest.raises(Invalid, match="use 2 to 127"):
        Code(size)


def test_eight_wrong_bytes_are_mended_and_nine_are_not() -> None:
    code = Code(16)
    data = bytes(range(128))
    parity = code.parity(data)
    spoilt = bytearray(data)
    for wrong in range(1, 10):
        spoilt[wrong * 13] ^= 0x55
        expected = (data, wrong) if wrong <= 8 else (bytes(spoilt), -1)
        assert code.repair(bytes(spoilt), parity) == expected


def test_wrong_parity_bytes_count_as_corrected() -> None:
    code = Code(16)
    parity = bytearray(code.parity(HEADER))
    parity[3] ^= 1
    assert code.repair(HEADER, bytes(parity)) == (HEADER, 1)


def test_number_of_parity_bytes_is_found_among_zeros() -> None:
    for size in (2, 5, 16, 127):
        assert list(matching_sizes(HEADER, bytes(300) + Code(size).parity(HEADER))) == [size]
    assert list(matching_sizes(HEADER, bytes(300))) == []
