"""Digests of sealed files, equal to those of Linux's fs-verity.

A file is cut into blocks, the last one zero padded.  Each block is hashed, with the salt in front;
the hashes, in blocks again, make the next level, until one hash, the root, is left.  The tree holds
the levels from the root's down to the leaves'.  The file's digest is the hash of a 256-byte
descriptor, which holds the root, the parameters and the size.

Source: Documentation/filesystems/fsverity.rst and include/uapi/linux/fsverity.h.

Nothing here is checked on each access: a direct mapping bypasses every place where that could be
done.  It is checked when a file is attached, and when somebody asks.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple, Self

from vfsmap.errors import Damaged, Invalid
from vfsmap.units import KIB

Bytes = bytes | bytearray | memoryview

DESCRIPTOR_SIZE: Final = 256
_DESCRIPTOR: Final = struct.Struct("<BBBBIQ64s32s144x")
_VERSION: Final = 1
_SMALLEST_BLOCK, _LARGEST_BLOCK = 1 * KIB, 64 * KIB
_SALT_MAX: Final = 32


class Algorithm(NamedTuple):
    """A hash function, as fs-verity numbers it."""

    name: str
    number: int
    digest_size: int
    block_size: int
    """Of the hash function itself: the salt is padded to a multiple of it."""


SHA256: Final = Algorithm("sha256", 1, 32, 64)
SHA512: Final = Algorithm("sha512", 2, 64, 128)
ALGORITHMS: Final = {algorithm.name: algorithm for algorithm in (SHA256, SHA512)}


class Parameters(NamedTuple):
    """How a file is hashed; the defaults are those of the fsverity tool."""

    algorithm: str = SHA256.name
    block_size: int = 4 * KIB
    salt: bytes = b""

    def require_valid(self) -> None:
        """Check them.

        Raises:
            Invalid: an unknown algorithm, a block size that is no power of two from 1 to 64 KiB,
                or a salt of more than 32 bytes.
        """
        if self.algorithm not in ALGORITHMS:
            raise Invalid(f"hash {self.algorithm!r}: one of {', '.join(ALGORITHMS)} is expected")
        size = self.block_size
        if size & (size - 1) or not _SMALLEST_BLOCK <= size <= _LARGEST_BLOCK:
            raise Invalid(f"block size {size}: a power of two from 1024 to 65536 is expected")
        if len(self.salt) > _SALT_MAX:
            raise Invalid(f"a salt has at most {_SALT_MAX} bytes, not {len(self.salt)}")

    def encode(self) -> str:
        """Return them as a line of text: ``hash=sha256 block=4096 salt=``."""
        return f"hash={self.algorithm} block={self.block_size} salt={self.salt.hex()}"

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return what a line of text says; what it leaves out has its default.

        Raises:
            Invalid: it can't be read, or as :meth:`require_valid`.
        """
        found: dict[str, Any] = {}
        for word in text.split():
            name, _, value = word.partition("=")
            field = _FIELDS.get(name)
            try:
                # None raises, and is caught
                found[field[0]] = field[1](value)  # type: ignore[index]
            except (TypeError, ValueError):
                raise Invalid(
                    f"{word!r} is no parameter of a seal; write hash=sha512 block=4096 salt=00ff"
                ) from None
        made = cls(**found)
        made.require_valid()
        return made


DEFAULT: Final = Parameters()
_FIELDS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "hash": ("algorithm", str),
    "block": ("block_size", int),
    "salt": ("salt", bytes.fromhex),
}


class Descriptor(NamedTuple):
    """What fixes a file's content: parameters, size and root hash."""

    algorithm: Algorithm
    block_size: int
    salt: bytes
    size: int
    root: bytes

    def encode(self) -> bytes:
        """Return the 256 bytes that the digest is the hash of."""
        return _DESCRIPTOR.pack(
            _VERSION,
            self.algorithm.number,
            self.block_size.bit_length() - 1,
            len(self.salt),
            0,
            self.size,
            self.root,
            self.salt,
        )

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Return the descriptor that 256 bytes hold.

        Raises:
            Damaged: they hold none.
        """
        if len(raw) != DESCRIPTOR_SIZE:
            raise Damaged(f"a verity descriptor has {DESCRIPTOR_SIZE} bytes, not {len(raw)}")
        version, number, log2, salt_size, _, size, root, salt = _DESCRIPTOR.unpack(raw)
        algorithm = next((a for a in ALGORITHMS.values() if a.number == number), None)
        if (
            version != _VERSION
            or algorithm is None
            or salt_size > _SALT_MAX
            or not 10 <= log2 <= 16
        ):
            raise Damaged("the verity descriptor makes no sense")
        return cls(algorithm, 1 << log2, salt[:salt_size], size, root[: algorithm.digest_size])

    @property
    def parameters(self) -> Parameters:
        """How the file was hashed."""
        return Parameters(self.algorithm.name, self.block_size, self.salt)

    @property
    def digest(self) -> bytes:
        """The file's digest."""
        return hashlib.new(self.algorithm.name, self.encode()).digest()

    def __str__(self) -> str:
        """Return the digest as the fsverity tool prints it."""
        return f"{self.algorithm.name}:{self.digest.hex()}"


class Hasher:
    """Builds the Merkle tree of a file that is fed to it piece by piece."""

    def __init__(
        self, algorithm: str = "sha256", *, block_size: int = 4 * KIB, salt: bytes = b""
    ) -> None:
        """Start with an empty file.

        Raises:
            Invalid: as :meth:`Parameters.require_valid`.
        """
        Parameters(algorithm, block_size, salt).require_valid()
        self._algorithm = ALGORITHMS[algorithm]
        self._block_size = block_size
        self._salt = salt
        padding = -len(salt) % self._algorithm.block_size
        self._salted = hashlib.new(algorithm, salt + bytes(padding))
        self._size = 0
        self._rest = b""
        self._leaves = bytearray()

    def _hash(self, block: Bytes) -> bytes:
        state = self._salted.copy()
        state.update(block)
        return state.digest()

    def feed(self, data: Bytes) -> None:
        """Add the next bytes of the file; quickest in multiples of the block size."""
        self._size += len(data)
        view = memoryview(self._rest + data if self._rest else data)
        whole = len(view) - len(view) % self._block_size
        for at in range(0, whole, self._block_size):
            self._leaves += self._hash(view[at : at + self._block_size])
        self._rest = bytes(view[whole:])

    def finish(self) -> tuple[Descriptor, bytes]:
        """Return the descriptor, and the tree with the root's level first."""
        if self._rest:
            self._leaves += self._hash(self._rest.ljust(self._block_size, b"\0"))
            self._rest = b""
        level = bytes(self._leaves)
        levels: list[bytes] = []
        while len(level) > self._algorithm.digest_size:
            level = level.ljust(len(level) + -len(level) % self._block_size, b"\0")
            levels.insert(0, level)
            level = b"".join(self._hash(block) for block in blocks(level, self._block_size))
        root = level or bytes(self._algorithm.digest_size)
        descriptor = Descriptor(self._algorithm, self._block_size, self._salt, self._size, root)
        return descriptor, b"".join(levels)


def blocks(data: Bytes, size: int) -> Iterator[memoryview]:
    """Yield ``data`` in blocks of ``size`` bytes; the last one may be short."""
    view = memoryview(data)
    for at in range(0, len(view), size):
        yield view[at : at + size]


def hash_file(
    pieces: Iterable[Bytes],
    algorithm: str = "sha256",
    *,
    block_size: int = 4 * KIB,
    salt: bytes = b"",
) -> tuple[Descriptor, bytes]:
    """Return the descriptor and the tree of a file given in pieces."""
    hasher = Hasher(algorithm, block_size=block_size, salt=salt)
    for piece in pieces:
        hasher.feed(piece)
    return hasher.finish()


class Verifier:
    """Checks pieces of a file against its descriptor and tree."""

    def __init__(self, descriptor: Descriptor, tree: bytes) -> None:
        """Check the tree itself first, up to the root.

        Raises:
            Damaged: the tree does not lead to the root hash.
        """
        self._descriptor = descriptor
        self._hasher = Hasher(
            descriptor.algorithm.name, block_size=descriptor.block_size, salt=descriptor.salt
        )
        self._leaves = self._checked_leaves(tree)

    def _checked_leaves(self, tree: bytes) -> memoryview:
        descriptor = self._descriptor
        block, digest = descriptor.block_size, descriptor.algorithm.digest_size
        sizes: list[int] = []
        hashes = -(-descriptor.size // block)
        while hashes > 1:
            sizes.insert(0, -(-hashes * digest // block) * block)
            hashes = sizes[0] // block
        if sum(sizes) > len(tree):
            raise Damaged(f"the Merkle tree has {len(tree)} bytes where {sum(sizes)} are needed")
        above, at = memoryview(descriptor.root), 0
        for size in sizes:
            level = memoryview(tree)[at : at + size]
            found = b"".join(map(self._hasher._hash, blocks(level, block)))
            if found != above[: len(found)]:
                raise Damaged(f"the Merkle tree is damaged at byte {at} of {len(tree)}")
            above, at = level, at + size
        return above

    def damaged(self, offset: int, data: Bytes) -> list[int]:
        """Return the numbers of the blocks that differ from what was sealed.

        Args:
            offset: where ``data`` lies in the file; a multiple of the block size.
            data: bytes of the file, up to its end or to a multiple of the block size.
        """
        block, digest = self._descriptor.block_size, self._descriptor.algorithm.digest_size
        wrong = []
        for number, piece in enumerate(blocks(data, block), offset // block):
            whole = piece if len(piece) == block else bytes(piece).ljust(block, b"\0")
            if self._hasher._hash(whole) != self._leaves[number * digest : (number + 1) * digest]:
                wrong.append(number)
        return wrong
