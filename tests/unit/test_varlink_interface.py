"""The interface file is what others program against: it must say what the code does."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from varlink.scanner import Interface

from vfsmap import errors
from vfsmap.daemon.connection import DEFAULT_LIMITS
from vfsmap.daemon.events import Event
from vfsmap.daemon.service import Service
from vfsmap.daemon.varlink import INTERFACE, SERVICE, declared_errors, description
from vfsmap.errors import NotAligned, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap.units import MIB

ROOT = Path(__file__).parents[2]


@pytest.fixture
def interface() -> Interface:
    return Interface(description(INTERFACE))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    async def nothing(*_: object) -> None:
        pass

    with FileSystem.format(Pool.create(tmp_path / "pool", 16 * MIB)) as fs:
        made = Service(fs, sync=nothing, seal=nothing, limits=DEFAULT_LIMITS)
        yield made
        made.close()


def test_both_definitions_are_read_by_a_parser_that_we_did_not_write() -> None:
    assert Interface(description(INTERFACE)).name == INTERFACE
    assert Interface(description(SERVICE)).name == SERVICE


def test_the_documentation_holds_the_definition_that_is_served() -> None:
    assert (ROOT / "docs" / f"{INTERFACE}.varlink").read_text() == description(INTERFACE)


def test_every_method_of_the_definition_is_there_with_its_parameters(
    interface: Interface, service: Service
) -> None:
    declared = {n: m for n, m in interface.members.items() if type(m).__name__ == "_Method"}
    assert set(declared) == {*service.methods, "Events"}
    for name, method in service.methods.items():
        fields = msgspec.structs.fields(method.parameters)
        in_type = declared[name].in_type.fields
        assert {field.name for field in fields} == set(in_type)
        for field in fields:
            optional = type(in_type[field.name]).__name__ == "_Maybe"
            assert optional != field.required, f"{name}({field.name})"


def test_the_fields_and_kinds_of_an_event_are_those_of_the_definition(
    interface: Interface,
) -> None:
    fields = msgspec.structs.fields(Event)
    assert [field.name for field in fields] == list(interface.members["Event"].type.fields)
    kind = next(field.type for field in fields if field.name == "kind")
    assert list(interface.members["EventKind"].type.fields) == list(kind.__args__)


def test_every_declared_error_is_a_class_and_says_the_fields_it_has(interface: Interface) -> None:
    for name in declared_errors():
        kind = getattr(errors, name)
        assert issubclass(kind, VfsmapError)
        fields = interface.members[name].type.fields
        assert next(iter(fields)) == "message"
        own = [f for f in fields if f != "message"]
        assert own == (["value", "align"] if kind is NotAligned else [])


def test_errors_with_fields_of_their_own_are_declared() -> None:
    with_fields = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, VfsmapError) and "__init__" in vars(kind)
    }
    assert with_fields & declared_errors() == {"NotAligned"}
