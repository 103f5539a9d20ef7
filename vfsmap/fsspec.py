"""Files of a mounted pool for everything that speaks fsspec: pandas, pyarrow, dask, zarr.

``vfsmap:///mnt/pool/x`` names the file ``/mnt/pool/x``.  Reads are copied once, out of a window
over the pool's own bytes, where such a window can be had; elsewhere, and for writing, the file is
opened as any other.  For no copy at all take :meth:`VfsmapFileSystem.window`.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from vfsmap.daemon.attach import map as map_file
from vfsmap.errors import Unsupported, VfsmapError
from vfsmap.mapping.window import Window

Limit = int | None


class WindowFile(io.BufferedIOBase):
    """A file that is read from a window; it has the size that it had when it was opened.

    While it is open the file can't be cut (EBUSY): its bytes are mapped.
    """

    mode = "rb"

    def __init__(self, window: Window, path: str) -> None:
        """Read from ``window``, which is closed with the file."""
        self.path = self.name = path
        self.size = window.length
        self._window = window
        self._view = window.view()
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Have the next read begin elsewhere.

        Raises:
            ValueError: that is before the file's start, or ``whence`` is none.
        """
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}
        if whence not in starts:
            raise ValueError(f"whence {whence}: 0, 1 or 2 is expected")
        at = starts[whence] + offset
        if at < 0:
            raise ValueError(f"{at} is before the start of the file")
        self._at = at
        return at

    def read(self, size: Limit = -1, /) -> bytes:
        """Return up to ``size`` bytes, or all that are left."""
        return bytes(self._next(size))

    read1 = read

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer, and return how many bytes there were for it."""
        target = memoryview(buffer).cast("B")
        piece = self._next(len(target))
        target[: len(piece)] = piece
        return len(piece)

    readinto1 = readinto

    def _next(self, size: Limit) -> memoryview:
        if self.closed:
            raise ValueError("the file is closed")
        at = min(self._at, self.size)
        end = self.size if size is None or size < 0 else min(at + size, self.size)
        self._at = max(self._at, end)
        return self._view[at:end]

    def close(self) -> None:
        """Close the window."""
        if not self.closed:
            self._view.release()
            if not getattr(self, "_finalizing", False):  # io.IOBase sets it before it calls us
                self._window.close()
            del self._window
        super().close()


class VfsmapFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files below a mount of vfsmap, and any others; what is not told here is as for local files.

    Errors are those of the operating system: FileNotFoundError, PermissionError and so on.
    """

    protocol = "vfsmap"

    def __init__(self, auto_mkdir: bool = True, **options: Any) -> None:
        """Make the file system; ``auto_mkdir``: a file that is written gets its directories."""
        super().__init__(auto_mkdir=auto_mkdir, **options)

    @property
    def fsid(self) -> str:
        """A name for this kind of file system."""
        return "vfsmap"

    def window(self, path: str, **options: Any) -> Window:
        """Return a window over a file, as :func:`vfsmap.map` does, with its options: no copy."""
        with _as_os_errors(path):
            return map_file(self._strip_protocol(path), **options)

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any
    ) -> Any:
        path = self._strip_protocol(path)
        if mode == "rb":
            with suppress(Unsupported):
                return WindowFile(self.window(path, direct=True), path)
        return super()._open(path, mode, block_size, **options)

    def cat_file(self, path: str, start: Limit = None, end: Limit = None, **options: Any) -> bytes:
        """Return a file's bytes from ``start`` to ``end``; negative ones count from its end."""
        with self.open(path, "rb", **options) as file:
            return _part(file, start, end)

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Limit | Sequence[Limit],
        ends: Limit | Sequence[Limit],
        max_gap: int | None = None,
        on_error: str = "return",
        **options: Any,
    ) -> list[bytes | Exception]:
        """Return ranges of files; each file is mapped once.

        Args:
            paths: files, perhaps the same one several times.
            starts: where each range starts, or all of them do.
            ends: where each range ends, or all of them do.
            max_gap: ranges so near to each other could be read at once; there is nothing to gain.
            on_error: ``return`` puts an error in the place of its bytes, else it is raised.
            options: those of :meth:`open`.
        """
        count = len(paths)
        starts = starts if isinstance(starts, Sequence) else [starts] * count
        ends = ends if isinstance(ends, Sequence) else [ends] * count
        if not len(starts) == len(ends) == count:
            raise ValueError(f"{count} paths, {len(starts)} starts and {len(ends)} ends given")
        found: list[bytes | Exception] = [b""] * count
        by_path: dict[str, list[int]] = {}
        for index, path in enumerate(paths):
            by_path.setdefault(path, []).append(index)
        for path, indices in by_path.items():
            try:
                with self.open(path, "rb", **options) as file:
                    for index in indices:
                        found[index] = _part(file, starts[index], ends[index])
            except Exception as exc:
                if on_error != "return":
                    raise
                for index in indices:
                    found[index] = exc
        return found


def _part(file: Any, start: Limit, end: Limit) -> bytes:
    size = file.seek(0, io.SEEK_END)
    first, last, _ = slice(start, end).indices(size)
    file.seek(first)
    data: bytes = file.read(max(0, last - first))
    return data


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except Unsupported:
        raise
    except VfsmapError as exc:
        raise OSError(exc.errno, str(exc), path) from exc
