"""Functions of unmodified Debian modules, run from mapped text, agree with independent ones."""

import hashlib
import math
import os
import random
import signal
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import lz4.block
import pytest
import reedsolo

import vfsmap
from vfsmap.errors import Crashed, NotFound, Unsupported
from vfsmap.kmod.host import Host
from vfsmap.kmod.module import Module
from vfsmap.kmod.runner import Runner
from vfsmap.kmod.store import Store
from vfsmap.kmod.userspace import user_host
from vfsmap.testing.kernels import modules

NAMES = [
    "cordic",
    "crc32_pclmul",
    "crc32c_intel",
    "crc7",
    "crc_itu_t",
    "crct10dif_pclmul",
    "gf128mul",
    "libcurve25519_generic",
    "libpoly1305",
    "lz4_compress",
    "lz4hc_compress",
    "md4",
    "raid6_pq",
    "rational",
    "reed_solomon",
    "sha1_ssse3",
    "sha256_ssse3",
    "sha512_ssse3",
    "xor",
    "libchacha",
]
ROUNDS = 12


@pytest.fixture(scope="module", params=["61", "612"])
def runner(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runner]:
    store = tmp_path_factory.mktemp("store")
    found = modules(request.param)
    Store(store).add([Module.open(found[name]) for name in NAMES], Host(user_host()))
    with Runner(store, NAMES, vfsmap.map) as runner:
        yield runner


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def crc(bits: int, polynomial: int, value: int, data: bytes, *, reflected: bool = False) -> int:
    """Return a checksum, bit by bit."""
    for byte in data:
        if reflected:
            value ^= byte
            for _ in range(8):
                value = value >> 1 ^ (polynomial if value & 1 else 0)
        else:
            value ^= byte << bits - 8
            for _ in range(8):
                value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & (1 << bits) - 1
    return value


def text_of(rng: random.Random, size: int) -> bytes:
    """Return bytes that can be compressed."""
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(20)]
    return b"".join(rng.choice(words) for _ in range(size))[:size]


def test_checksums_of_7_and_16_bits(runner: Runner, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        data = rng.randbytes(rng.randrange(200))
        start = rng.randrange(0x80) << 1
        found = runner.call("crc7", "crc7_be", start, data, len(data)).value & 0xFF
        assert found == crc(8, 0x09 << 1, start, data)
        start = rng.randrange(0x10000)
        found = runner.call("crc_itu_t", "crc_itu_t", start, data, len(data)).value & 0xFFFF
        assert found == crc(16, 0x1021, start, data)


def test_checksums_by_vector_instructions(runner: Runner, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        data = rng.randbytes(16 * rng.randrange(4, 40))
        start = rng.randrange(1 << 32)
        found = runner.call("crc32_pclmul", "crc32_pclmul_le_16", data, len(data), start).value
        assert found & 0xFFFFFFFF == crc(32, 0xEDB88320, start, data, reflected=True)
        assert crc(32, 0xEDB88320, 0xFFFFFFFF, data, reflected=True) ^ 0xFFFFFFFF == zlib.crc32(
            data
        )
        found = runner.call("crc32c_intel", "crc_pcl", data, len(data), start).value
        assert found & 0xFFFFFFFF == crc(32, 0x82F63B78, start, data, reflected=True)
        start &= 0xFFFF
        found = runner.call("crct10dif_pclmul", "crc_t10dif_pcl", start, data, len(data)).value
        assert found & 0xFFFF == crc(16, 0x8BB7, start, data)


@pytest.mark.parametrize("level", [None, 9])
def test_compressed_blocks_are_what_they_were(
    runner: Runner, rng: random.Random, level: int | None
) -> None:
    for _ in range(ROUNDS):
        data = text_of(rng, rng.randrange(1, 20000))
        room = bytes(len(data) + len(data) // 255 + 16)
        if level is None:
            arguments = ("lz4_compress", "LZ4_compress_default")
            found = runner.call(*arguments, data, room, len(data), len(room), bytes(16416))
        else:
            arguments = ("lz4hc_compress", "LZ4_compress_HC")
            found = runner.call(*arguments, data, room, len(data), len(room), level, bytes(262192))
        packed = found.buffers[1][: found.value & 0xFFFFFFFF]
        assert lz4.block.decompress(packed, uncompressed_size=len(data)) == data
        if len(data) > 1000:
            assert len(packed) < len(data)


def hash_by_blocks(
    runner: Runner, image: str, function: str, state: str, data: bytes, words: str, length: int
) -> bytes:
    """Return a hash of the Merkle-Damgard kind; the module supplies the inner function."""
    block = 128 if words.endswith("Q") else 64
    size = len(data).to_bytes(length, "little" if words == "<4I" else "big") * 8
    bits = (8 * len(data)).to_bytes(length, "little" if words == "<4I" else "big")
    assert len(size) == 8 * length
    padded = data + b"\x80" + bytes(-(len(data) + 1 + length) % block) + bits
    start = struct.pack(words.replace(">", "<"), *(int(word, 16) for word in state.split()))
    if image == "md4":
        for at in range(0, len(padded), block):
            start = runner.call(image, function, start, padded[at : at + block]).buffers[0]
    else:
        count = len(padded) // block
        start = runner.call(image, function, start, padded, count).buffers[0]
    return struct.pack(words, *struct.unpack(words.replace(">", "<"), start))


SHA1 = "67452301 efcdab89 98badcfe 10325476 c3d2e1f0"
SHA256 = "6a09e667 bb67ae85 3c6ef372 a54ff53a 510e527f 9b05688c 1f83d9ab 5be0cd19"
SHA512 = (
    "6a09e667f3bcc908 bb67ae8584caa73b 3c6ef372fe94f82b a54ff53a5f1d36f1 "
    "510e527fade682d1 9b05688c2b3e6c1f 1f83d9abfb41bd6b 5be0cd19137e2179"
)


@pytest.mark.parametrize(
    ("name", "state", "words", "length"),
    [("sha1", SHA1, ">5I", 8), ("sha256", SHA256, ">8I", 8), ("sha512", SHA512, ">8Q", 16)],
)
def test_hashes_by_vector_instructions(
    runner: Runner, rng: random.Random, name: str, state: str, words: str, length: int
) -> None:
    for _ in range(ROUNDS):
        data = rng.randbytes(rng.randrange(500))
        function = f"{name}_transform_ssse3"
        found = hash_by_blocks(runner, f"{name}_ssse3", function, state, data, words, length)
        assert found == hashlib.new(name, data).digest()


def md4(data: bytes) -> bytes:
    """Return the MD4 digest, by RFC 1320."""
    mask = 0xFFFFFFFF
    state = [0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476]
    rounds: list[tuple[Callable[[int, int, int], int], int, Sequence[int], tuple[int, ...]]] = [
        (lambda x, y, z: x & y | ~x & z, 0, range(16), (3, 7, 11, 19)),
        (
            lambda x, y, z: x & y | x & z | y & z,
            0x5A827999,
            [4 * (i % 4) + i // 4 for i in range(16)],
            (3, 5, 9, 13),
        ),
        (
            lambda x, y, z: x ^ y ^ z,
            0x6ED9EBA1,
            (0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15),
            (3, 9, 11, 15),
        ),
    ]
    padded = data + b"\x80" + bytes(-(len(data) + 9) % 64) + struct.pack("<Q", 8 * len(data))
    for at in range(0, len(padded), 64):
        block = struct.unpack_from("<16I", padded, at)
        a, b, c, d = state
        for mix, constant, order, shifts in rounds:
            for step, index in enumerate(order):
                value = (a + mix(b, c, d) + block[index] + constant) & mask
                shift = shifts[step % 4]
                a, b, c, d = d, (value << shift | value >> 32 - shift) & mask, b, c
        state = [(old + new) & mask for old, new in zip(state, (a, b, c, d), strict=True)]
    return struct.pack("<4I", *state)


def test_md4_agrees_with_its_specification(runner: Runner, rng: random.Random) -> None:
    assert md4(b"abc").hex() == "a448017aaf21d8525fc10ae87aa6729d"
    for _ in range(ROUNDS):
        data = rng.randbytes(rng.randrange(300))
        start = struct.pack("<4I", 0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
        padded = data + b"\x80" + bytes(-(len(data) + 9) % 64) + struct.pack("<Q", 8 * len(data))
        for at in range(0, len(padded), 64):
            call = runner.call("md4", "md4_transform", start, padded[at : at + 64])
            start = call.buffers[0]
        assert start == md4(data)


def test_reed_solomon_parity_is_that_of_another_coder(runner: Runner, rng: random.Random) -> None:
    control = runner.call("reed_solomon", "init_rs_gfp", 8, 0x11D, 0, 1, 16, 0xCC0).value
    assert control
    coder = reedsolo.RSCodec(nsym=16, nsize=255, fcr=0, prim=0x11D, generator=2, c_exp=8)
    for _ in range(ROUNDS):
        data = rng.randbytes(rng.randrange(1, 239))
        found = runner.call("reed_solomon", "encode_rs8", control, data, len(data), bytes(32), 0)
        parity = bytes(struct.unpack("<16H", found.buffers[1]))
        assert parity == bytes(coder.encode(data))[len(data) :]


def test_poly1305_is_arithmetic_modulo_a_prime(runner: Runner, rng: random.Random) -> None:
    prime = (1 << 130) - 5
    for _ in range(ROUNDS):
        raw, data = rng.randbytes(16), rng.randbytes(16 * rng.randrange(1, 30))
        key = runner.call("libpoly1305", "poly1305_core_setkey", bytes(80), raw).buffers[0]
        state = bytes(40)
        blocks = len(data) // 16
        state = runner.call(
            "libpoly1305", "poly1305_core_blocks", state, key, data, blocks, 1
        ).buffers[0]
        nonce = rng.randbytes(16)
        tag = runner.call("libpoly1305", "poly1305_core_emit", state, nonce, bytes(16)).buffers[2]
        r = int.from_bytes(raw, "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
        total = 0
        for at in range(0, len(data), 16):
            total = (total + int.from_bytes(data[at : at + 16] + b"\1", "little")) * r % prime
        total = (total + int.from_bytes(nonce, "little")) & (1 << 128) - 1
        assert tag == total.to_bytes(16, "little")


def x25519(scalar: bytes, point: bytes) -> bytes:
    """Multiply a point of the curve, by RFC 7748's ladder."""
    p = 2**255 - 19
    k = int.from_bytes(scalar, "little") & ~7 & (1 << 255) - 1 | 1 << 254
    x1 = int.from_bytes(point, "little") & (1 << 255) - 1
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for bit in reversed(range(255)):
        now = k >> bit & 1
        if swap ^ now:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = now
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = (d * a + c * b) ** 2 % p, x1 * (d * a - c * b) ** 2 % p
        aa, bb = a * a % p, b * b % p
        x2, z2 = aa * bb % p, (aa - bb) * (aa + 121665 * (aa - bb)) % p
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, -1, p) % p).to_bytes(32, "little")


def test_curve25519_multiplies_points(runner: Runner, rng: random.Random) -> None:
    for _ in range(3):
        secret, point = rng.randbytes(32), rng.randbytes(32)
        found = runner.call("libcurve25519_generic", "curve25519_generic", bytes(32), secret, point)
        assert found.buffers[0] == x25519(secret, point)


def test_cordic_turns_angles_into_coordinates(runner: Runner, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        degrees = rng.randrange(-179, 180)
        value = runner.call("cordic", "cordic_calc_iq", degrees).value
        x, y = struct.unpack("<2i", value.to_bytes(8, "little"))
        assert x / 65536 == pytest.approx(math.cos(math.radians(degrees)), abs=1e-3)
        assert y / 65536 == pytest.approx(math.sin(math.radians(degrees)), abs=1e-3)


def test_rational_finds_the_best_fraction(runner: Runner, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        top, bottom = rng.randrange(1, 10**6), rng.randrange(10**6, 10**9)
        found = runner.call(
            "rational", "rational_best_approximation", top, bottom, 10**7, 5000, bytes(8), bytes(8)
        )
        fraction = Fraction(*(int.from_bytes(buffer, "little") for buffer in found.buffers))
        best = Fraction(top, bottom).limit_denominator(5000)
        exact = Fraction(top, bottom)
        assert abs(fraction - exact) == abs(best - exact)


def test_gf128_multiplication_is_that_of_polynomials(runner: Runner, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        a, b = rng.randbytes(16), rng.randbytes(16)
        found = runner.call("gf128mul", "gf128mul_bbe", a, b).buffers[0]
        x, y, product = int.from_bytes(a, "big"), int.from_bytes(b, "big"), 0
        for bit in range(128):
            if y >> bit & 1:
                product ^= x << bit
        for bit in range(254, 127, -1):
            if product >> bit & 1:
                product ^= (1 << 128 | 0x87) << bit - 128
        assert found == product.to_bytes(16, "big")


def test_xor_of_two_blocks(runner: Runner, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        size = 512 * rng.randrange(1, 9)
        a, b = rng.randbytes(size), rng.randbytes(size)
        found = runner.call("xor", "xor_sse_2", size, a, b).buffers[0]
        assert found == bytes(x ^ y for x, y in zip(a, b, strict=True))


def test_raid6_syndromes_are_sums_in_a_field(runner: Runner, rng: random.Random) -> None:
    def double(value: int) -> int:
        return value << 1 & 0xFF ^ (0x1D if value & 0x80 else 0)

    disks, size = 6, 512
    data = [rng.randbytes(size) for _ in range(disks - 2)]
    places = [runner.allocate(block + bytes(64)) for block in data]
    places += [runner.allocate(bytes(size + 64)) for _ in range(2)]
    # vector instructions want their blocks aligned
    aligned = [place + 63 & -64 for place in places]
    for place, block in zip(aligned, data, strict=False):
        runner.write(place, block)
    for function in ("raid6_int1_gen_syndrome", "raid6_sse21_gen_syndrome"):
        runner.call("raid6_pq", function, disks, size, struct.pack(f"<{disks}Q", *aligned))
        p, q = bytearray(size), bytearray(size)
        for block in reversed(data):
            for at, byte in enumerate(block):
                p[at] ^= byte
                q[at] = double(q[at]) ^ byte
        assert runner.read(aligned[-2], size) == bytes(p)
        assert runner.read(aligned[-1], size) == bytes(q)


def test_text_is_mapped_in_place_and_never_written(runner: Runner) -> None:
    assert set(runner.reports) == set(NAMES)
    for report in runner.report().values():
        assert report["bound_here"]
        assert report["overlaid"] == report["differing_sites"] == 0


def test_traced_functions_still_compute_and_their_pages_are_copies(tmp_path: Path) -> None:
    Store(tmp_path).add([Module.open(modules("61")["reed_solomon"])], Host(user_host()))
    with Runner(tmp_path, ["reed_solomon"], vfsmap.map, policy="redirect") as runner:
        sites = runner.trace("reed_solomon", True)
        assert sites > 3
        control = runner.call("reed_solomon", "init_rs_gfp", 8, 0x11D, 0, 1, 16, 0xCC0).value
        assert control
        report = runner.report()["reed_solomon"]
        assert 0 < report["overlaid"] <= 8192
        assert runner.trace("reed_solomon", False) == sites
        assert runner.call("reed_solomon", "init_rs_gfp", 8, 0x11D, 0, 1, 16, 0xCC0).value


def test_what_has_no_stand_in_is_named(tmp_path: Path) -> None:
    Store(tmp_path).add([Module.open(modules("61")["libchacha"])], Host(user_host()))
    with (
        Runner(tmp_path, ["libchacha"], vfsmap.map) as runner,
        pytest.raises(Unsupported, match="called chacha_block_generic"),
    ):
        runner.call("libchacha", "chacha_crypt_generic", bytes(64), bytes(64), bytes(64), 64, 20)


def test_code_gone_wild_ends_the_child_and_nothing_else(tmp_path: Path) -> None:
    Store(tmp_path).add([Module.open(modules("61")["crc7"])], Host(user_host()))
    with Runner(tmp_path, ["crc7"], vfsmap.map) as runner:
        with pytest.raises(NotFound, match="no symbol 'nothing'"):
            runner.call("crc7", "nothing")
        with pytest.raises(Crashed, match="crc7:crc7_be ended the child by SIGSEGV"):
            runner.call("crc7", "crc7_be", 0, 8, 100)
        with pytest.raises(Crashed):
            runner.call("crc7", "crc7_be", 0, b"", 0)


def test_a_function_that_does_not_return_is_stopped(tmp_path: Path) -> None:
    Store(tmp_path).add([Module.open(modules("61")["crc7"])], Host(user_host()))
    with Runner(tmp_path, ["crc7"], vfsmap.map, timeout=0.1) as runner:
        os.kill(runner.pid, signal.SIGSTOP)  # stands for a loop without an end
        with pytest.raises(Crashed, match=r"has not returned after 0\.1 s"):
            runner.call("crc7", "crc7_be", 0, b"a", 1)
