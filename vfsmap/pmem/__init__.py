"""Persistent memory: what a medium is, how to store to it, and what the kernel makes of it."""

from vfsmap.pmem.files import lock_holder
from vfsmap.pmem.medium import Commit, Medium, Promise, detect
from vfsmap.pmem.pmem import Pmem

__all__ = ["Commit", "Medium", "Pmem", "Promise", "detect", "lock_holder"]
