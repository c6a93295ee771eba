"""Where connections come from: settings, URLs of both flavours, and an engine pair per pool."""

from aftercommit.pools.pools import Pool, Pools
from aftercommit.pools.settings import PoolSettings

__all__ = ["Pool", "PoolSettings", "Pools"]
