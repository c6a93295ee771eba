"""Publish in the transaction, handle after the commit: one durable task per event and handler."""

from aftercommit.events.publishing import EventHandle

__all__ = ["EventHandle"]
