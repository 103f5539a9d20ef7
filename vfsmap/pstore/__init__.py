"""The crash log: pstore zones in a mapped file, interchangeable with the kernel's ramoops.

Reading: :class:`Region`.  Writing: :class:`Recorder`, and :class:`RecorderHandler` for
:mod:`logging`.  Making a region: :func:`format_region` with a :class:`Geometry`.
"""

from vfsmap.pstore.format import format_region
from vfsmap.pstore.geometry import Geometry
from vfsmap.pstore.handler import RecorderHandler
from vfsmap.pstore.reader import File
from vfsmap.pstore.recorder import Recorder
from vfsmap.pstore.region import Region

__all__ = ["File", "Geometry", "Recorder", "RecorderHandler", "Region", "format_region"]
