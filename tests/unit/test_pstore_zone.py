import pytest

from vfsmap.errors import Damaged
from vfsmap.pstore.ecc import Code
from vfsmap.pstore.geometry import Kind, Place
from vfsmap.pstore.zone import SIGNATURE, Zone

SIZE = 0x2000


def make_zone(ecc: int = 0, kind: Kind = "console") -> tuple[bytearray, Zone]:
    buffer = bytearray(SIZE)
    zone = Zone(Place(kind, 0, 0, SIZE), memoryview(buffer), ecc)
    zone.format(0x060C75 if kind == "ftrace" else 0)
    return buffer, zone


def reopen(buffer: bytearray, ecc: int = 0) -> Zone:
    return Zone(Place("console", 0, 0, SIZE), memoryview(buffer), ecc)


@pytest.mark.parametrize("ecc", [0, 16, 5])
def test_what_is_written_is_read_back_and_the_ring_keeps_the_tail(ecc: int) -> None:
    buffer, zone = make_zone(ecc)
    written = b""
    for n in range(400):
        line = b"line %d %s\n" % (n, b"x" * (n % 90))
        zone.write(line)
        written += line
        assert zone.read() == written[-zone.capacity :]
    assert reopen(buffer, ecc).attach() == (written[-zone.capacity :], 0, 0)


def test_bytes_on_the_medium_are_the_kernels() -> None:
    buffer, zone = make_zone()
    zone.write(b"hello pmsg one\n")
    zone.write(b"hello pmsg two\n")
    assert buffer[:42] == bytes.fromhex("444247431e0000001e000000") + (
        b"hello pmsg one\nhello pmsg two\n"
    )


def test_header_parity_is_the_last_bytes_of_the_zone() -> None:
    buffer, zone = make_zone(16)
    zone.write(b"x" * 300)
    assert buffer[-16:] == Code(16).parity(buffer[:12])
    assert buffer[12 + zone.capacity :][:48] == Code(16).parities(b"x" * 300 + bytes(84))


def test_filling_the_ring_to_the_last_byte_starts_it_over() -> None:
    _, zone = make_zone()
    zone.write(b"a" * zone.capacity)
    assert (zone.start, zone.size) == (0, zone.capacity)
    zone.write(b"b")
    assert (zone.start, zone.size) == (1, zone.capacity)
    assert zone.read() == b"a" * (zone.capacity - 1) + b"b"


def test_more_than_the_zone_holds_keeps_the_tail() -> None:
    _, zone = make_zone()
    zone.write(b"lost" + bytes(range(256)) * 32)
    assert zone.read() == (bytes(range(256)) * 32)[-zone.capacity :]


def test_zap_empties_the_zone_but_leaves_its_bytes() -> None:
    buffer, zone = make_zone(16)
    zone.write(b"secret")
    zone.zap()
    assert zone.read() == b""
    assert buffer[12:18] == b"secret"
    assert reopen(buffer, 16).attach() == (b"", 0, 0)


@pytest.mark.parametrize(
    ("start", "size"), [(5, 4), (0, SIZE), (SIZE, SIZE), (2**32 - 1, 2**32 - 1)]
)
def test_header_that_makes_no_sense_is_zapped_by_attach(start: int, size: int) -> None:
    buffer, zone = make_zone()
    zone.write(b"text")
    buffer[4:12] = start.to_bytes(4, "little") + size.to_bytes(4, "little")
    zone = reopen(buffer)
    assert not zone.valid
    assert zone.attach() == (b"", 0, 0)
    assert zone.valid


def test_wrong_signature_is_reported_and_nothing_is_written() -> None:
    buffer, _ = make_zone()
    buffer[0] ^= 0xFF
    before = bytes(buffer)
    with pytest.raises(Damaged, match=r"signature is 0x434742bb; format the region"):
        reopen(buffer).attach()
    assert buffer == before


def test_ftrace_zone_tells_its_kernels_version() -> None:
    buffer, zone = make_zone(kind="ftrace")
    assert buffer[:4] == bytes.fromhex("314e4143")
    assert (zone.version, zone.signed) == (0x060C75, True)
    assert not Zone(
        Place("ftrace", 0, 0, SIZE), memoryview(SIGNATURE.to_bytes(4, "little") + bytes(SIZE))
    ).signed


def test_eight_flipped_bytes_a_block_are_mended_on_the_medium_and_counted() -> None:
    buffer, zone = make_zone(16)
    zone.write(bytes(range(256)) * 4)
    clean = bytes(buffer)
    for at in range(12, 12 + 256, 16):
        buffer[at] ^= 0xA5
    assert reopen(buffer, 16).attach() == (bytes(range(256)) * 4, 16, 0)
    assert buffer == clean


def test_nine_flipped_bytes_are_reported_and_passed_through() -> None:
    buffer, zone = make_zone(16)
    zone.write(b"a" * 256)
    for at in range(12, 21):
        buffer[at] ^= 0xA5
    spoilt = bytes(buffer)
    log = reopen(buffer, 16).attach()
    assert (log.corrected, log.bad) == (0, 1)
    assert log.data == spoilt[12:268]
    assert buffer == spoilt


def test_header_is_mended_before_it_is_believed() -> None:
    buffer, zone = make_zone(16)
    zone.write(b"text")
    buffer[1:9] = b"\xff" * 8
    assert reopen(buffer, 16).attach() == (b"text", 8, 0)
    assert buffer[:12] == bytes.fromhex("444247430400000004000000")


def test_wrong_parity_bytes_are_counted_but_not_mended() -> None:
    buffer, zone = make_zone(16)
    zone.write(b"text")
    buffer[-1] ^= 1
    spoilt = bytes(buffer)
    assert reopen(buffer, 16).attach() == (b"text", 1, 0)
    assert buffer == spoilt


def test_write_whose_writer_died_is_made_good_by_reseal() -> None:
    for offset in (100, 7200):
        buffer, zone = make_zone(16)
        zone.write(b"a" * offset)
        before = bytes(buffer[12 + zone.capacity :])
        zone.write(b"b" * 150)
        buffer[12 + zone.capacity :] = before  # the stores of parity never happened
        zone = reopen(buffer, 16)
        zone.reseal(offset, 150)
        log = reopen(buffer, 16).attach()
        assert (log.data[-151:], log.corrected, log.bad) == (b"a" + b"b" * 150, 0, 0)


def test_reseal_computes_parity_afresh_even_after_a_survey() -> None:
    buffer, zone = make_zone(16)
    zone.write(b"a" * 100)
    zone.survey()
    buffer[12:60] = b"t" * 48  # stored by somebody who died before the parity
    zone.reseal(0, 48)
    assert reopen(buffer, 16).attach() == (b"t" * 48 + b"a" * 52, 0, 0)


def test_after_a_survey_parity_is_still_that_of_the_data() -> None:
    buffer, zone = make_zone(16)
    other_buffer, other = make_zone(16)
    buffer[12 + 700] ^= 1  # a block whose parity is wrong, as the survey will find
    other_buffer[12 + 700] ^= 1
    zone.survey()
    for n in range(400):
        line = b"line %d %s\n" % (n, b"x" * (n * 7 % 150))
        zone.write(line)
        other.write(line)
        assert buffer == other_buffer


def test_spoilt_start_does_not_stop_the_writer() -> None:
    buffer, zone = make_zone()
    zone.write(b"old")
    buffer[4:8] = b"\xff" * 4
    zone.write(b"new")
    assert zone.read() == b"new"


def test_released_zone_lets_the_buffer_go() -> None:
    buffer, zone = make_zone(16)
    zone.release()
    buffer.clear()  # raises BufferError when a view is left
