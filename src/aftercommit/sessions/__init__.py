"""How a session lives: opened for an owner, committed, ended for good."""

from aftercommit.sessions.ended import end_for_good
from aftercommit.sessions.factory import SessionFactory
from aftercommit.sessions.opened import AsyncOpened, Opened, SyncOpened, is_async_callable, to_the_end
from aftercommit.sessions.scopes import AsyncScope, Scope, shielded
from aftercommit.watch.owners import CallSite, Owner, line_of, serving, user_line

__all__ = [
    "AsyncOpened",
    "AsyncScope",
    "CallSite",
    "Opened",
    "Owner",
    "Scope",
    "SessionFactory",
    "SyncOpened",
    "end_for_good",
    "is_async_callable",
    "line_of",
    "serving",
    "shielded",
    "to_the_end",
    "user_line",
]
