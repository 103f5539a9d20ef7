"""The parameters of each method, as the interface declares them; what does not fit is refused."""

from typing import Annotated

import msgspec

from vfsmap.daemon.varlink import INT_MAX

Size = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]


class Nothing(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The parameters of a method that takes none; base of the others."""


class FileCall(Nothing):
    """How methods name a file: parameters of Seal."""

    file: int | None = None
    path: Text | None = None


class MapCall(FileCall):
    """Parameters of Map."""

    offset: Size | None = None
    length: Size | None = None
    writable: bool | None = None
    level: Size | None = None
    ticket: bool | None = None


class ExtentsCall(FileCall):
    """Parameters of Extents."""

    offset: Size | None = None
    tree: bool | None = None


class AllocateCall(FileCall, kw_only=True):
    """Parameters of Allocate."""

    offset: Size | None = None
    length: Size
    level: Size | None = None
    create: bool | None = None


class LeasesCall(Nothing):
    """Parameters of Leases."""

    after: int | None = None


class LeaseCall(Nothing):
    """Parameters of Publish."""

    lease: int


class ReleaseCall(LeaseCall):
    """Parameters of Release."""

    alone: bool | None = None


class ViolationCall(LeaseCall, kw_only=True):
    """Parameters of Violation."""

    offset: Size | None = None
    length: Size | None = None
    detail: Text


class InterfaceCall(Nothing):
    """Parameters of org.varlink.service.GetInterfaceDescription."""

    interface: Text


class StatsCall(Nothing):
    """Parameters of Stats."""

    coverage: bool | None = None
