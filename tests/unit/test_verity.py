import hashlib
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmap.errors import Damaged, Invalid
from vfsmap.units import KIB, MIB
from vfsmap.verity import Descriptor, Hasher, Verifier, blocks, hash_file


def sample(size: int) -> bytes:
    """The bytes that the digests below were computed over."""
    return bytes((i * i + 7 * i + (i >> 8)) & 255 for i in range(size))


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        (b"", "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"),
        (b"abc", "700b6bd8510f0b4f9bac8b9cf0459151a1c4a99f467892bb4bd289a67df8e19c"),
        (sample(1), "b803429503d95915829b29fdbc8bbad142f3abfd11b1cadf5526582e685c0551"),
        (sample(4096), "d22553cc9a950e37b8d8ba0b5ab0cf1ce14f2fb555ad6fe04a4450517447c564"),
        (sample(4097), "9f6e2d9425d3fd6e6961c0eb8c7c23b177842ffb04af97f75561879269d13d7d"),
        (sample(524288), "eba791c09d7df9e86b9ee02446162a253552622e5ad4c78342a1b60569a2d349"),
        (sample(524289), "df33ecb1aca47572a49fdccf9874ae2707ebacc1684ecc3aa5fba7682b3dcd35"),
        (sample(3000000), "b9f7d5148a0bdfdc9e821bca624ca79229fc1306b793ad636d5499825f95d137"),
        (bytes(2 * MIB), "bba136aa5b317db776d7dc0d449289355cba5446fcdeef07489e16ffb3dc245b"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else "",
)
def test_digests_are_those_that_the_kernel_measures(data: bytes, digest: str) -> None:
    descriptor, _ = hash_file([data])
    assert str(descriptor) == f"sha256:{digest}"


def test_small_blocks_and_a_salt_give_the_kernels_digest() -> None:
    descriptor, _ = hash_file([sample(2 * MIB)], block_size=1024, salt=b"\x01\x02")
    assert (
        descriptor.digest.hex()
        == "570963e409e487b53438be29a669d618f481667a863677b5dee4ebbbf7bc1a9b"
    )


@pytest.mark.parametrize(
    ("size", "block_size", "algorithm", "tree_size"),
    [
        (4097, 4096, "sha256", 4096),
        (524288, 4096, "sha256", 4096),
        (524289, 4096, "sha256", 12288),
        (3000000, 4096, "sha256", 28672),
        (2 * MIB, 1024, "sha256", 68608),
        (2 * MIB, 4096, "sha512", 36864),
        (4096, 4096, "sha256", 0),
    ],
)
def test_trees_have_the_sizes_that_the_kernel_stores(
    size: int, block_size: int, algorithm: str, tree_size: int
) -> None:
    _, tree = hash_file([bytes(size)], algorithm, block_size=block_size)
    assert len(tree) == tree_size


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("block_size", [1024, 4096])
@pytest.mark.parametrize("salt", [b"", b"\x00\x01\x02\x03", b"s" * 32])
def test_digests_equal_those_of_the_fsverity_tool(
    tmp_path: Path, algorithm: str, block_size: int, salt: bytes
) -> None:
    for size in (0, 1, block_size, block_size + 1, 100 * KIB):
        require_the_tools(tmp_path, sample(size), algorithm, block_size, salt)


def require_the_tools(
    directory: Path, content: bytes, algorithm: str, block_size: int, salt: bytes
) -> None:
    """Hold digest, descriptor and tree of a file against those of the fsverity tool."""
    tool = shutil.which("fsverity")
    assert tool, "the fsverity tool is missing: install Debian's package fsverity"
    file, tree, descriptor = (directory / name for name in ("file", "tree", "descriptor"))
    file.write_bytes(content)
    options = [f"--hash-alg={algorithm}", f"--block-size={block_size}", "--compact"]
    options += [f"--out-merkle-tree={tree}", f"--out-descriptor={descriptor}"]
    options += [f"--salt={salt.hex()}"] if salt else []
    printed = subprocess.run([tool, "digest", *options, file], capture_output=True, check=True)
    ours, our_tree = hash_file([content], algorithm, block_size=block_size, salt=salt)
    case = f"{len(content)} bytes, {options[:2]}, salt {salt.hex()}"
    assert printed.stdout.decode().strip() == ours.digest.hex(), case
    assert descriptor.read_bytes() == ours.encode(), case
    assert tree.read_bytes() == our_tree, case


def require_the_tools_for_any(directory: Path, count: int, seed: int) -> None:
    """Try random contents and parameters; half of the sizes lie where a tree grows."""
    rng = random.Random(seed)
    for _ in range(count):
        algorithm = rng.choice(("sha256", "sha512"))
        block_size = rng.choice((1024, 2048, 4096))
        salt = rng.randbytes(rng.choice((0, rng.randrange(1, 33), 32)))
        size = rng.randrange(300 * KIB)
        if rng.random() < 0.5:
            hashes = block_size // (32 if algorithm == "sha256" else 64)
            full = block_size * rng.choice((1, 2, hashes, hashes + 1, 2 * hashes, hashes**2))
            size = max(0, min(full, 4 * MIB) + rng.choice((-1, 0, 1)))
        require_the_tools(directory, rng.randbytes(size), algorithm, block_size, salt)


def test_some_files_have_the_fsverity_tools_digest_descriptor_and_tree(tmp_path: Path) -> None:
    require_the_tools_for_any(tmp_path, 40, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_files_have_the_fsverity_tools_digest_descriptor_and_tree(
    tmp_path: Path, seed: int
) -> None:
    require_the_tools_for_any(tmp_path, 500, seed)


@given(st.binary(max_size=20 * KIB), st.lists(st.integers(1, 5000), min_size=1))
def test_the_pieces_in_which_a_file_is_fed_do_not_matter(data: bytes, cuts: list[int]) -> None:
    hasher = Hasher(block_size=1024)
    at = 0
    for cut in cuts:
        hasher.feed(data[at : at + cut])
        at += cut
    hasher.feed(data[at:])
    assert hasher.finish() == hash_file([data], block_size=1024)


@given(st.integers(0, 299 * KIB), st.integers(1, 255))
def test_a_flipped_byte_is_found_in_its_block_and_nowhere_else(at: int, flip: int) -> None:
    data = bytearray(hashlib.shake_128(b"x").digest(300 * KIB))
    descriptor, tree = hash_file([data])
    verifier = Verifier(descriptor, tree)
    assert verifier.damaged(0, data) == []
    data[at] ^= flip
    assert verifier.damaged(0, data) == [at // 4096]
    piece = at // 4096 * 4096
    assert verifier.damaged(piece, data[piece : piece + 4096]) == [at // 4096]


def test_a_damaged_tree_is_reported_and_not_believed() -> None:
    descriptor, tree = hash_file([sample(1 * MIB)])
    for at in range(0, len(tree), 4096):
        wrong = bytearray(tree)
        wrong[at] ^= 1
        with pytest.raises(Damaged, match=r"damaged at byte|needed"):
            Verifier(descriptor, bytes(wrong))
    with pytest.raises(Damaged, match="are needed"):
        Verifier(descriptor, tree[:-1])


def test_a_descriptor_survives_encoding_and_garbage_is_refused() -> None:
    descriptor, _ = hash_file([b"abc"], "sha512", block_size=1024, salt=b"salt")
    assert Descriptor.decode(descriptor.encode()) == descriptor
    for garbage in (b"", b"\xff" * 256, bytes(256)):
        with pytest.raises(Damaged):
            Descriptor.decode(garbage)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"algorithm": "md5"}, "md5"),
        ({"block_size": 3000}, "3000"),
        ({"block_size": 512}, "512"),
        ({"salt": bytes(33)}, "33"),
    ],
)
def test_parameters_that_fs_verity_does_not_know_are_refused(
    options: dict[str, object], reason: str
) -> None:
    with pytest.raises(Invalid, match=reason):
        Hasher(**options)  # type: ignore[arg-type]  # of several types


def test_blocks_cover_everything_in_order() -> None:
    assert [bytes(b) for b in blocks(b"abcdefg", 3)] == [b"abc", b"def", b"g"]
