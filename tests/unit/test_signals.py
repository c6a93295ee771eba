"""Subscribers come and go."""

import asyncio
import dataclasses
import functools
import inspect
import re
import threading
from typing import Any
from uuid import UUID

import pytest

from aftercommit import signals
from aftercommit.errors import ConfigurationError

# Of the module, and not by `__subclasses__`: with slots each class is made twice, and the first one stays in there.
KINDS = [each for each in vars(signals).values() if inspect.isclass(each) and issubclass(each, signals.Signal)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_payload_is_frozen_and_says_what_it_carries(kind: type[signals.Signal]):
    """No subscriber can change what the next one gets; each class has a docstring with a line for each field."""
    document = inspect.cleandoc(vars(kind)["__doc__"])  # 3.13 does so itself
    own = {name for name in inspect.get_annotations(kind) if not name.startswith("_")}

    assert "__dataclass_params__" in vars(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert not document.startswith(f"{kind.__name__}(")
    assert set(re.findall(r"^ {4}(\w+): ", document, re.MULTILINE)) == own
    assert {field.name for field in dataclasses.fields(kind)} >= own


def test_every_payload_is_public():
    """Every class of payload is exported, and so listed in the reference, which is held against these names."""
    assert {kind.__name__ for kind in KINDS} <= set(signals.__all__)


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


def test_what_is_collected_while_somebody_subscribes_is_told_of():
    """A session may be collected between any two lines, also of ``subscribe``: its thread does not wait for itself."""
    seen: list[signals.SessionLeaked] = []
    signals.subscribe(signals.SessionLeaked)(seen.append)

    def collect() -> None:
        with signals._lock:
            signals.emit(signals.SessionLeaked(pool="request", owner="code", line=None, seconds=1.0))

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10.0)
    signals._called.clear()
    is_stuck = thread.is_alive()

    assert not is_stuck
    assert len(seen) == 1
    signals.unsubscribe(seen.append)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_a_subscriber_that_would_end_a_thread_does_not(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """``sys.exit()`` in a thread of ours would end that thread without a word, and with it the watch or the tasks."""
    seen: list[signals.Signal] = []
    survived: list[bool] = []

    @signals.subscribe(signals.PoolPaused)
    def leave(_signal: signals.PoolPaused) -> None:
        raise kind

    def tell() -> None:
        signals.emit(signals.PoolPaused(pool="files"))
        survived.append(True)

    signals.subscribe(signals.PoolPaused)(seen.append)
    try:
        thread = threading.Thread(target=tell)
        thread.start()
        thread.join(30.0)
    finally:
        signals.unsubscribe(leave)
        signals.unsubscribe(seen.append)

    assert survived == [True]
    assert len(seen) == 1
    [line] = [each for each in caplog.records if each.name == "aftercommit.signals"]
    assert "leave" in line.getMessage()
    assert line.exc_info is not None
    assert line.exc_info[0] is kind


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_means_the_process_passes_through_its_main_thread(kind: type[BaseException]) -> None:
    """Ctrl-C, and what the handler of a signal of the process raises, may arrive in the middle of a subscriber."""

    @signals.subscribe(signals.PoolPaused)
    def interrupted(_signal: signals.PoolPaused) -> None:
        raise kind

    try:
        with pytest.raises(kind):
            signals.emit(signals.PoolPaused(pool="files"))
    finally:
        signals.unsubscribe(interrupted)


@pytest.mark.parametrize("kind", [GeneratorExit, asyncio.CancelledError])
def test_what_means_no_process_passes_nowhere(kind: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    """A subscriber awaits nothing, so that a cancellation in it is its own, and cancels nobody else."""

    @signals.subscribe(signals.PoolPaused)
    def cancelled(_signal: signals.PoolPaused) -> None:
        raise kind

    try:
        signals.emit(signals.PoolPaused(pool="files"))
    finally:
        signals.unsubscribe(cancelled)

    assert "A subscriber of PoolPaused raised" in caplog.text


async def _awaited(_signal: signals.Signal) -> None:
    """A subscriber that nobody would ever await."""


class _AwaitedToo:
    """The same as an object."""

    async def __call__(self, signal: signals.Signal) -> None:
        """Be called, and not awaited."""


@pytest.mark.parametrize("function", [_awaited, functools.partial(_awaited), _AwaitedToo()])
def test_a_subscriber_that_would_have_to_be_awaited_is_refused(function: Any) -> None:
    """Called without being awaited it would do nothing at all."""
    with pytest.raises(ConfigurationError, match="plain function"):
        signals.subscribe(signals.PoolPaused)(function)

    assert not signals.wanted(signals.PoolPaused)


@pytest.mark.parametrize("kinds", [(), (print,), ("PoolPaused",), (signals.PoolPaused, int)])
def test_what_is_no_kind_of_signal_cannot_be_subscribed_to(kinds: tuple[Any, ...]) -> None:
    """Neither can nothing: ``@signals.subscribe`` without kinds would leave the function without a subscription."""
    with pytest.raises(ConfigurationError, match=r"@signals\.subscribe\(signals\.TaskFailed\)"):
        signals.subscribe(*kinds)
