"""Where records come from: cut into chunks one after the other, and loaded chunk by chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import ColumnElement, Select, bindparam, func, inspect, select, tuple_
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.util import AliasedInsp

from aftercommit.batches.stretches import Stretch
from aftercommit.errors import ConfigurationError, RowGone
from aftercommit.tasks.references import KeyCodec

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["Chunk", "Loaded", "Source", "source_of"]

_PAGES_AHEAD: Final = 32
"""Chunks whose keys are read with one statement."""
_LARGE: Final = 500
"""Records in a chunk from which its last key alone is looked for."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The records of a chunk.

    Attributes:
        values: What the handler is given, one after the other; the key where there is no row.
        missing: Why there is no row, by place in *values*.
    """

    values: list[Any]
    missing: Mapping[int, Exception] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records of one transaction.

    Attributes:
        stretch: Where they are.
        values: The values, or keys; None for rows, which are found by their keys.
    """

    stretch: Stretch
    values: tuple[Any, ...] | None = None


class Source(Protocol):
    """Records, in order."""

    codec: KeyCodec | None

    def next(self, read: Callable[[Callable[[Session], Any]], Any], following: Callable[[Any], Any]) -> Chunk | None:
        """Cut the next chunk; None at the end. One lane at a time.

        Args:
            read: Runs a function in a short session.
            following: Gives the next value of an iterator.
        """
        ...

    def load(self, session: Session, chunk: Chunk) -> Loaded:
        """The records of *chunk*, with one statement."""
        ...

    def key_of(self, value: Any) -> Any:
        """What a report calls a record. Asked for those that fail: for all, it would cost a part of each load."""
        ...

    def count(self, read: Callable[[Callable[[Session], Any]], Any]) -> int | None:
        """How many records are left, where that can be said."""
        ...


def source_of(source: Any, entity: type | None, *, size: int, is_async: bool) -> Callable[[list[Stretch]], Source]:
    """Return what makes the source of what a user gave, once it is known what is left of it.

    Raises:
        ConfigurationError: For what cannot be a source.
    """
    if isinstance(source, Select):
        mapper, kind = _mapper_of(source, entity)
        return lambda left: kind(source, mapper, size, left)
    if isinstance(source, AsyncIterable) and not is_async:
        raise ConfigurationError("The source is an async generator: write await db.async_run_batch(…) to read it.")
    if isinstance(source, (str, bytes)) or not isinstance(source, (Iterable, AsyncIterable)):
        raise ConfigurationError(
            f"A batch runs over a Select of a mapped class, keys with entity=…, or any iterable of values; "
            f"{type(source).__name__} is none of them."
        )
    keyed = None if entity is None else _entity_mapper(entity)
    return lambda left: _Values(source, keyed, size, left)


def _entity_mapper(entity: Any) -> Mapper[Any]:
    mapper = inspect(entity, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise ConfigurationError(f"entity={entity!r} is no mapped class.")
    return mapper


def _mapper_of(statement: Select[Any], entity: type | None) -> tuple[Mapper[Any], type[_Rows]]:
    if entity is not None:
        raise ConfigurationError("entity= says of which class keys are; a Select says so itself. Leave it out.")
    described = statement.column_descriptions
    mapper = inspect(described[0].get("entity"), raiseerr=False)
    is_whole = len(described) == 1 and described[0]["expr"] is described[0].get("entity")
    if isinstance(mapper, AliasedInsp):
        raise ConfigurationError(
            "A batch pages on the primary key of a mapped class, and this Select is of an alias. Select the class."
        )
    if not isinstance(mapper, Mapper) or not (is_whole or _is_key(described, mapper)):
        raise ConfigurationError(
            "A batch runs over a Select of one mapped class, whose rows the handler is given: select(Order).where(…); "
            "or of exactly its primary key, to be given keys of rows that are not loaded: select(Order.id).where(…)."
        )
    # No public name says that a limit was set; these are tried (`private_names`).
    if statement._limit_clause is not None or statement._offset_clause is not None:  # noqa: SLF001
        raise ConfigurationError(
            "This Select has a limit or an offset, which pages of a batch would count anew. Leave them out, or pass "
            "the keys: run_batch(session.scalars(…).all(), …, entity=…)."
        )
    return mapper, _Rows if is_whole else _Keys


def _is_key(described: Sequence[Mapping[str, Any]], mapper: Mapper[Any]) -> bool:
    """Whether a Select is of the primary key of *mapper*, each part of it, in order, and of nothing else."""
    if any(each.get("entity") is not mapper.entity for each in described):
        return False
    found = [getattr(each["expr"], "property", None) for each in described]
    return found == [mapper.get_property_by_column(column) for column in mapper.primary_key]


# --- rows -------------------------------------------------------------------------------------------------------


class _Rows:
    """Rows of a Select, page by page on the primary key: whatever appears or vanishes, no page moves."""

    def __init__(self, statement: Select[Any], mapper: Mapper[Any], size: int, left: list[Stretch]) -> None:
        self._statement = statement.order_by(None).order_by(*mapper.primary_key)
        self._columns = mapper.primary_key
        self.codec: KeyCodec | None = KeyCodec(mapper)
        self._mapper = mapper
        self._size = size
        self._left = deque(left)
        self._pages: deque[Chunk] = deque()
        inner = statement.order_by(None).subquery()
        self._inner = [_inside(inner, column) for column in self._columns]
        self._keys = select(*self._inner).order_by(*self._inner).distinct()

    def next(self, read: Callable[[Callable[[Session], Any]], Any], following: Callable[[Any], Any]) -> Chunk | None:  # noqa: ARG002
        """The next page."""
        while not self._pages:
            if not self._left:
                return None
            self._cut(self._left.popleft(), read)
        return self._pages.popleft()

    def _cut(self, gap: Stretch, read: Callable[[Callable[[Session], Any]], Any]) -> None:
        """Cut some pages off *gap*, and put back what is left of it."""
        after = gap.after
        those = self._keys.where(*self._between(self._inner, after, gap.last))
        if self._size >= _LARGE and self._cut_large(gap, those, read):
            return
        wanted = self._size * _PAGES_AHEAD
        statement = those.limit(wanted)
        keys = read(lambda session: session.execute(statement).all())
        place = gap.start
        for first in range(0, len(keys), self._size):
            page = keys[first : first + self._size]
            stop = place + len(page)
            last = self._write(tuple(page[-1]))
            is_rest = gap.stop is not None and (stop >= gap.stop or (first + self._size >= len(keys) < wanted))
            if is_rest:
                # A gap between two stretches: however many rows there are in it by now, its last page closes it.
                self._pages.append(Chunk(Stretch(place, gap.stop, after, gap.last)))
                return
            self._pages.append(Chunk(Stretch(place, stop, after, last)))
            place, after = stop, last
        if len(keys) == wanted or (keys and gap.stop is None):
            # Behind the last row another may have appeared by the time we get there.
            self._left.appendleft(Stretch(place, gap.stop, after, gap.last))

    def _cut_large(self, gap: Stretch, those: Select[Any], read: Callable[[Callable[[Session], Any]], Any]) -> bool:
        """Cut one full page off *gap*; False if no more than that is left of it.

        The database counts to its last row faster than its keys could be read.
        """
        ending = those.limit(1).offset(self._size - 1)
        key = read(lambda session: session.execute(ending).first())
        stop = gap.start + self._size
        if key is None or (gap.stop is not None and stop >= gap.stop):
            return False
        last = self._write(tuple(key))
        self._pages.append(Chunk(Stretch(gap.start, stop, gap.after, last)))
        self._left.appendleft(Stretch(stop, gap.stop, last, gap.last))
        return True

    def load(self, session: Session, chunk: Chunk) -> Loaded:
        """The rows of the page, as they are now."""
        return Loaded(list(session.scalars(self._of(chunk)).unique()))

    def _of(self, chunk: Chunk) -> Select[Any]:
        return self._statement.where(*self._between(self._columns, chunk.stretch.after, chunk.stretch.last))

    def key_of(self, value: Any) -> Any:
        """The row's primary key."""
        return _shown(inspect(value).identity)

    def count(self, read: Callable[[Callable[[Session], Any]], Any]) -> int | None:
        """How many rows are left."""
        total = 0
        for gap in self._left:
            statement = select(*self._inner).distinct()
            for condition in self._between(self._inner, gap.after, gap.last):
                statement = statement.where(condition)
            counting = select(func.count()).select_from(statement.subquery())
            total += int(read(partial(_scalar, counting)) or 0)
        return total

    def _write(self, key: tuple[Any, ...]) -> list[Any]:
        assert self.codec is not None  # noqa: S101  # of rows, always
        return self.codec.write(key)

    def _between(self, columns: Any, after: Any, last: Any) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if after is not None:
            found.append(_compare(columns, self._bound(after), greater=True))
        if last is not None:
            found.append(_compare(columns, self._bound(last), greater=False))
        return found

    def _bound(self, stored: list[Any]) -> list[Any]:
        assert self.codec is not None  # noqa: S101  # of rows, always
        values = self.codec.read(stored)
        return [bindparam(None, value, type_=column.type) for value, column in zip(values, self._columns, strict=True)]


class _Keys(_Rows):
    """Keys of a Select, read in pages just so: for set-based work, whose rows nobody need load."""

    def load(self, session: Session, chunk: Chunk) -> Loaded:
        """The keys of the page whose rows are there now."""
        statement = self._keys.where(*self._between(self._inner, chunk.stretch.after, chunk.stretch.last))
        if len(self._inner) == 1:
            return Loaded(list(session.scalars(statement)))
        return Loaded([tuple(row) for row in session.execute(statement)])

    def key_of(self, value: Any) -> Any:
        """The key itself."""
        return value


def _scalar(statement: Select[Any], session: Session) -> Any:
    return session.scalar(statement)


def _inside(subquery: Any, column: ColumnElement[Any]) -> ColumnElement[Any]:
    found = subquery.corresponding_column(column)
    if found is None:
        raise ConfigurationError("This Select does not load the primary key of its class. Select the class itself.")
    return found  # type: ignore[no-any-return]  # a subquery's column


def _compare(columns: Any, values: list[Any], *, greater: bool) -> ColumnElement[bool]:
    if len(values) == 1:
        return columns[0] > values[0] if greater else columns[0] <= values[0]  # type: ignore[no-any-return]  # a column
    left, right = tuple_(*columns), tuple_(*values)
    return left > right if greater else left <= right


def _shown(identity: Any) -> Any:
    return identity[0] if len(identity) == 1 else tuple(identity)


# --- values -----------------------------------------------------------------------------------------------------


class _Values:
    """Values one after the other, or keys whose rows are loaded chunk by chunk."""

    codec: KeyCodec | None = None

    def __init__(self, source: Any, mapper: Mapper[Any] | None, size: int, left: list[Stretch]) -> None:
        self._source = source
        self._iterator: Iterator[Any] | AsyncIterator[Any] | None = None
        self._mapper = mapper
        self._size = size
        self._left = deque(left)
        self._place = 0

    def next(self, read: Callable[[Callable[[Session], Any]], Any], following: Callable[[Any], Any]) -> Chunk | None:  # noqa: ARG002
        """The next values."""
        if self._iterator is None:
            self._iterator = aiter(self._source) if isinstance(self._source, AsyncIterable) else iter(self._source)
        while self._left:
            gap = self._left[0]
            try:
                while self._place < gap.start:
                    following(self._iterator)
                    self._place += 1
                stop = None if gap.stop is None else gap.stop - gap.start
                values = self._take(self._size if stop is None else min(self._size, stop), following)
            except StopIteration:
                values = []
            if not values:
                self._left.clear()
                return None
            self._place = gap.start + len(values)
            if self._place == gap.stop:
                self._left.popleft()
            else:
                self._left[0] = Stretch(self._place, gap.stop)
            return Chunk(Stretch(gap.start, self._place), tuple(values))
        return None

    def _take(self, wanted: int, following: Callable[[Any], Any]) -> list[Any]:
        values: list[Any] = []
        while len(values) < wanted:
            try:
                values.append(following(self._iterator))
            except StopIteration:
                break
        return values

    def load(self, session: Session, chunk: Chunk) -> Loaded:
        """The values; for keys, their rows."""
        assert chunk.values is not None  # noqa: S101  # cut above
        if self._mapper is None:
            return Loaded(list(chunk.values))
        return self._rows(session, self._mapper, chunk.values)

    def key_of(self, value: Any) -> Any:
        """The row's primary key, or the value itself."""
        if self._mapper is None or not isinstance(value, self._mapper.class_):
            return value
        return _shown(inspect(value).identity)

    def _rows(self, session: Session, mapper: Mapper[Any], keys: tuple[Any, ...]) -> Loaded:
        columns = mapper.primary_key
        wanted = [tuple(key) if isinstance(key, (tuple, list)) else (key,) for key in keys]
        is_single = len(columns) == 1
        condition = columns[0].in_([key[0] for key in wanted]) if is_single else tuple_(*columns).in_(wanted)
        rows = session.scalars(select(mapper.class_).where(condition)).unique().all()
        found = {tuple(inspect(row).identity): row for row in rows}
        return Loaded(
            [found.get(key, _shown(key)) for key in wanted],
            {place: _gone(mapper, key) for place, key in enumerate(wanted) if key not in found},
        )

    def count(self, read: Callable[[Callable[[Session], Any]], Any]) -> int | None:  # noqa: ARG002
        """How many are left, if the source can say."""
        if not isinstance(self._source, Sized):
            return None
        known = len(self._source)
        return sum(max(0, (known if gap.stop is None else gap.stop) - gap.start) for gap in self._left)


def _gone(mapper: Mapper[Any], key: tuple[Any, ...]) -> RowGone:
    text = f"{mapper.class_.__name__}({', '.join(map(str, key))}{',' if len(key) == 1 else ''})"
    return RowGone(f"{text} does not exist.", task="", row=text)
