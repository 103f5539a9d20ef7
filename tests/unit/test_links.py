"""How many names a file may have."""

import pytest

from vfsmap.errors import TooManyLinks
from vfsmap.fs.inode import ROOT
from vfsmap.fs.names import LINK_MAX
from vfsmap.testing.pools import make_fs, scratch
from vfsmap.units import MIB


def test_a_file_takes_names_up_to_the_limit_and_again_after_one_has_gone() -> None:
    with scratch() as place, make_fs(place / "pool", 8 * MIB) as fs:
        ino = fs.create(ROOT, b"first", 0o600, 0, 0).ino
        fs.get(ino).nlink = LINK_MAX - 1  # as if there were so many
        assert fs.link(ino, ROOT, b"last").nlink == LINK_MAX == 65_000
        with pytest.raises(TooManyLinks, match="65000 names"):
            fs.link(ino, ROOT, b"one more")
        assert b"one more" not in [name for _, name, _ in fs.entries(ROOT)]
        fs.unlink(ROOT, b"last")
        assert fs.link(ino, ROOT, b"instead").nlink == LINK_MAX


def test_a_directory_takes_any_number_of_directories() -> None:
    with scratch() as place, make_fs(place / "pool", 8 * MIB) as fs:
        fs.get(ROOT).nlink = LINK_MAX
        fs.mkdir(ROOT, b"one more", 0o700, 0, 0)
        assert fs.get(ROOT).nlink == LINK_MAX + 1
