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


def test_what_nobody_listens_to_is_not_wanted():
    """Only what somebody has subscribed to, by its class or by one above it, is wanted."""
    seen: list[signals.Signal] = []
    before = signals.wanted(signals.PoolPaused)

    signals.subscribe(signals.PoolPaused)(seen.append)
    by_itself = signals.wanted(signals.PoolPaused)
    signals.unsubscribe(seen.append)
    after = signals.wanted(signals.PoolPaused)
    signals.subscribe(signals.Signal)(seen.append)
    by_its_base = signals.wanted(signals.PoolPaused)
    signals.unsubscribe(seen.append)

    assert (before, by_itself, after, by_its_base) == (False, True, False, True)
