"""Take a region elsewhere: whole, or as the files it shows."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vfsmap.errors import Invalid
from vfsmap.pstore.backing import create_file, over_file, require_replaceable, translate
from vfsmap.pstore.reader import File
from vfsmap.pstore.region import Region


def copy_region(source: Region, target: Path, *, force: bool = False) -> int:
    """Copy all bytes of a region's file or buffer to a file; return how many.

    Raises:
        Exists: the file is there and not empty, and ``force`` was not given.
        Invalid: it is the source itself, or no regular file.
        NotFound, Denied, NoSpace: as the file system says.

    Crash: the target is not a region, or its last zones are missing.
    """
    data = bytes(source.view)
    with suppress(FileNotFoundError):
        status = target.stat()
        if (status.st_dev, status.st_ino) == source.key:
            raise Invalid(f"{target} is the region itself")
    require_replaceable(target, force=force)
    create_file(target, len(data))
    backing = over_file(target, writable=True)
    backing.view[:] = data
    backing.persist()
    backing.close()
    return len(data)


def extract(files: Iterable[File], directory: Path) -> None:
    """Write files to a directory, read-only and with the time of their records.

    Raises:
        NotFound, Denied, NoSpace: as the file system says.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file in files:
            path = directory / file.name
            path.unlink(missing_ok=True)
            path.write_bytes(file.data)
            if file.time_ns is not None:
                with suppress(OverflowError, OSError):  # a record can claim any time
                    os.utime(path, ns=(file.time_ns, file.time_ns))
            path.chmod(0o444)
    except OSError as exc:
        raise translate(exc, directory) from exc
