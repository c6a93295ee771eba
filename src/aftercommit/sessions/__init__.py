"""How a session lives: opened for an owner, committed, ended for good; and the hooks at its real commit."""

from aftercommit.sessions.ended import end_for_good
from aftercommit.sessions.factory import SessionFactory
from aftercommit.sessions.ledger import Entry, Sink, watch
from aftercommit.sessions.opened import AsyncOpened, Opened, SyncOpened, is_async_callable, to_the_end
from aftercommit.sessions.scopes import AsyncScope, Scope, shielded
from aftercommit.sessions.waiting import (
    at_every_commit,
    autocommits,
    has_begun,
    simulate_commits,
    sync_session_of,
    wait_for_commit,
)
from aftercommit.watch.owners import CallSite, Owner, line_of, serving, user_line

__all__ = [
    "AsyncOpened",
    "AsyncScope",
    "CallSite",
    "Entry",
    "Opened",
    "Owner",
    "Scope",
    "SessionFactory",
    "Sink",
    "SyncOpened",
    "at_every_commit",
    "autocommits",
    "end_for_good",
    "has_begun",
    "is_async_callable",
    "line_of",
    "serving",
    "shielded",
    "simulate_commits",
    "sync_session_of",
    "to_the_end",
    "user_line",
    "wait_for_commit",
    "watch",
]
