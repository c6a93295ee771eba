"""Subscribers come and go."""

from uuid import UUID

from aftercommit import signals


def test_a_method_can_be_unsubscribed():
    """Each access makes a new object of a bound method; it is the same subscriber all the same."""
    seen: list[signals.WorkerStarted] = []
    signals.subscribe(signals.WorkerStarted)(seen.append)

    signals.unsubscribe(seen.append)
    signals.emit(signals.WorkerStarted(worker=UUID(int=1), pools=()))

    assert seen == []
