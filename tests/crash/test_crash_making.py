"""Making a pool, where another one was: crashes leave the old one, none, or the new one."""

import pytest

from vfsmap.testing.making import making_lost


@pytest.mark.parametrize("medium", ["store", "flush", "sync"])
def test_a_pool_that_is_made_over_another_is_the_old_one_none_or_empty(medium: str) -> None:
    assert making_lost(medium) == []
