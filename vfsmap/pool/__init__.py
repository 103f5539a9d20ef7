"""The pool: crash-consistent objects and aligned bytes in one pmem file; our pmemobj."""

from vfsmap.pool.follower import Follower
from vfsmap.pool.journal import Commit
from vfsmap.pool.layout import Structure
from vfsmap.pool.pool import Pool
from vfsmap.pool.transaction import Transaction
from vfsmap.pool.typed import Oid

__all__ = ["Commit", "Follower", "Oid", "Pool", "Structure", "Transaction"]
