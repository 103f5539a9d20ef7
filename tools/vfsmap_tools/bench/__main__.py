"""``python -m vfsmap_tools.bench`` is ``vfsmap bench``."""

from vfsmap_tools.bench.command import bench

if __name__ == "__main__":
    bench()
