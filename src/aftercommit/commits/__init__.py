"""What waits for somebody's transaction: written at its real COMMIT, dropped with its rollback."""

from aftercommit.commits.fences import Fenced
from aftercommit.commits.hooks import (
    autocommits,
    fence_commits,
    listen,
    simulate_commits,
    simulates_commits,
    sync_session_of,
    wait_for_commit,
    watch,
)
from aftercommit.commits.pending import Entry, TransactionListener

__all__ = [
    "Entry",
    "Fenced",
    "TransactionListener",
    "autocommits",
    "fence_commits",
    "listen",
    "simulate_commits",
    "simulates_commits",
    "sync_session_of",
    "wait_for_commit",
    "watch",
]
