import errno

import pytest

from vfsmap import errors
from vfsmap.errors import VfsmapError

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, VfsmapError) and kind is not VfsmapError
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_an_errno_and_an_exit_code(kind: type[VfsmapError]) -> None:
    assert kind.errno in errno.errorcode
    assert kind.exit_code in (1, 2, 3)
    assert kind.__doc__


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_exit_code_2_means_that_an_argument_was_wrong(kind: type[VfsmapError]) -> None:
    assert (kind.exit_code == 2) == issubclass(kind, errors.Invalid)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_message_is_one_line_without_a_full_stop(kind: type[VfsmapError]) -> None:
    arguments = ("offset", 5, 4) if kind is errors.NotAligned else ("value 5 breaks the rule",)
    text = str(kind(*arguments))
    assert "\n" not in text
    assert not text.endswith(".")
    assert "5" in text


def test_a_careful_caller_can_catch_builtins() -> None:
    with pytest.raises(ValueError, match="bad"):
        raise errors.Invalid("bad")
    with pytest.raises(LookupError, match="no such name"):
        raise errors.NotFound("no such name")


def test_being_in_use_is_a_kind_of_being_busy() -> None:
    assert issubclass(errors.PoolInUse, errors.Busy)
    assert issubclass(errors.TooManyMappings, errors.NoMemory)
    assert issubclass(errors.NotAligned, errors.Invalid)
