"""A mapped instance crosses by its identity and is loaded anew in the task's session.

Stored as ``{"$row": "Order", "key": [7]}``: the class that the row had, which may be a subclass of the annotation's
(so that all of its columns are loaded at once), and its primary key, each part written by its column's Python type.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import decimal
import enum
import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import sqlalchemy
import sqlalchemy.exc
from pydantic_core import PydanticSerializationUnexpectedValue, core_schema
from sqlalchemy.orm import InstanceState, Mapper, Session

from aftercommit.errors import HandOverError, PayloadError, RowGone
from aftercommit.tasks.unsafe import key_hint, variable_hint

__all__ = ["KeyCodec", "Loading", "RowType", "Writing", "row_token"]


@dataclass(slots=True)
class Writing:
    """The context of a hand-over: the instances that were met, each known by its place here."""

    rows: list[tuple[RowType, object]] = field(default_factory=list)


@dataclass(slots=True)
class Loading:
    """The context of a load: where rows come from."""

    session: Session | None
    task: str
    run_id: uuid.UUID | None


# Stands for a row until its identity is known. Random, so that no text of a user's can pass for one; never stored.
_TOKEN = f"aftercommit:row:{uuid.uuid4().hex}:"


def row_token(index: int | str) -> str:
    """Return the mark that stands for row number *index* of a `Writing` until it is resolved (a regex's part too)."""
    return f"{_TOKEN}{index}"


class RowType:
    """Instances of one mapped class, as Pydantic sees them where it stands in ``Annotated``."""

    __slots__ = ("_codecs", "cls", "mapper")

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.mapper: Mapper[Any] = sqlalchemy.inspect(cls)
        self._codecs: list[_Codec | None] = [_codec_of(column) for column in self.mapper.primary_key]

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> core_schema.CoreSchema:
        """Write a mark for an instance, read it (or a stored reference) back."""
        return core_schema.with_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(self._mark, info_arg=True),
        )

    def _mark(self, value: object, info: core_schema.SerializationInfo) -> str:
        if not isinstance(value, self.cls):
            raise PydanticSerializationUnexpectedValue(f"Expected {self.cls.__name__}")
        writing = cast("Writing", info.context)
        writing.rows.append((self, value))
        return row_token(len(writing.rows) - 1)

    def _read(self, value: object, info: core_schema.ValidationInfo) -> object:
        context: object = info.context
        if isinstance(context, Loading):
            return self.load(value, context)
        if isinstance(value, str) and value.startswith(_TOKEN):
            return cast("Writing", context).rows[int(value[len(_TOKEN) :])][1]
        if info.mode == "python" and isinstance(value, self.cls):
            return value
        raise ValueError(f"not a row of {self.cls.__name__}")

    # --- hand-over ----------------------------------------------------------------------------------------------

    def refusal(self, instance: object, session: Session | None) -> tuple[str, str] | None:
        """Return why *instance* cannot be handed over by *session*, and what to do; None if it can. Loads nothing."""
        state: InstanceState[Any] = sqlalchemy.inspect(instance)
        owner = state.session
        if state.was_deleted or (owner is not None and state.key is not None and instance in owner.deleted):
            return _DELETED
        # Detached with an identity: whatever else it holds is left here, and its row was committed or read once
        # (a rollback takes the identity away again). Its key is all that is needed.
        if owner is None:
            return self._transient() if state.key is None else None
        if owner is session:
            return None
        if session is None:
            return (
                "belongs to a session whose transaction this hand-over does not wait for",
                f"hand over with that session, or pass the key, `{key_hint(self.cls)}`",
            )
        return (
            "belongs to another session than the one that hands over, so that this commit says nothing of its row",
            (
                f"hand over with its own session, bring it in with `session.merge({variable_hint(self.cls)})`, "
                f"or pass the key, `{key_hint(self.cls)}`"
            ),
        )

    def _transient(self) -> tuple[str, str]:
        return (
            "is in no session, so that nothing would ever write its row",
            f"`session.add({variable_hint(self.cls)})` first, or pass plain data",
        )

    def write(self, instance: object, *, task: str, path: Callable[[], str]) -> str:
        """Return the reference to *instance*, by the identity it has now, as JSON."""
        state: InstanceState[Any] = sqlalchemy.inspect(instance)
        identity = state.identity
        if identity is None:
            why = (
                "was never flushed: it has no key yet"
                if state.pending
                else "is not in the session any more (expunged, or its savepoint was rolled back): it has no row"
            )
            raise HandOverError(
                f"task {task!r}: `{path()}`, a `{self.cls.__name__}`, {why}. The task could not load it. Keep it in "
                "the session until the commit, or hand the task over in the savepoint that writes the row."
            )
        if state.identity_token is not None:
            raise HandOverError(
                f"task {task!r}: `{path()}`, a `{self.cls.__name__}`, has the identity token "
                f"{state.identity_token!r} (a shard), which a reference does not carry: the task would look for the "
                f"row elsewhere. Pass `{key_hint(self.cls)}` and the shard as plain data, and load the row in the task."
            )
        if state.was_deleted:
            raise HandOverError(
                f"task {task!r}: `{path()}`, a `{self.cls.__name__}`, was deleted after the hand-over, so that the "
                "task could not load it. Pass plain data instead, or hand over no task."
            )
        return f'{{"$row":{json.dumps(state.mapper.class_.__name__)},"key":[{self._write_key(identity, task, path)}]}}'

    def _write_key(self, identity: tuple[Any, ...], task: str, path: Callable[[], str]) -> str:
        if len(identity) == 1 and type(identity[0]) is int and self._codecs[0] is _INT:
            return str(identity[0])
        parts: list[str] = []
        for value, codec in zip(identity, self._codecs, strict=True):
            # asyncpg's UUID is a subclass; a datetime is one of date, and is written as what it is.
            found = (_BY_TYPE[base] for base in type(value).__mro__ if base in _BY_TYPE)
            own = codec if codec is not None and type(value) is codec.python_type else next(found, None)
            if own is None:
                raise HandOverError(
                    f"task {task!r}: the key of `{path()}`, a `{self.cls.__name__}`, has a part of type "
                    f"`{type(value).__qualname__}`, which cannot be written exactly. Pass `{key_hint(self.cls)}` "
                    "in a form of your own and load the row in the task."
                )
            part = own.encode(value)
            # Where the column says one type and holds another (a TypeDecorator), the value's own type stands beside it.
            parts.append(json.dumps(part if own is codec else {"$type": own.name, "value": part}))
        return ",".join(parts)

    # --- load ---------------------------------------------------------------------------------------------------

    def load(self, stored: object, loading: Loading) -> object:
        """Return the row that *stored* refers to, from the session at hand.

        Raises:
            ValueError: If this library did not write *stored*; nothing was asked of the database.
            RowGone: If the row is no longer there.
            PayloadError: If it is there and is not what the annotation says.
        """
        name, key = self._parse(stored)
        if loading.session is None:
            raise PayloadError(
                f"task {loading.task!r}: `{name}` is a row, and there is no session to load it in. "
                "Give the task a session as its first parameter.",
                task=loading.task,
                run_id=loading.run_id,
            )
        target = next(
            (m for m in self.mapper.self_and_descendants if m.class_.__name__ == name),
            self.mapper,
        )
        try:
            row = loading.session.get(target.class_, key)
            root = self.mapper.base_mapper
            if row is None and target is not root and not target.concrete:
                row = loading.session.get(root.class_, key)  # it is of another class by now, or it is gone
        except (OverflowError, sqlalchemy.exc.DataError) as exc:
            raise PayloadError(
                f"task {loading.task!r}: the stored key of `{name}` is nothing the database can look up.",
                task=loading.task,
                run_id=loading.run_id,
            ) from exc
        text = f"{name}({', '.join(map(str, key))}{',' if len(key) == 1 else ''})"
        if row is None:
            raise RowGone(
                f"task {loading.task!r}: {text} is gone, or not visible to the task's session: it was deleted "
                "after the task was asked for, or a policy, a schema or a filter hides it (@db.around sets what a "
                "tenant needs). The task is not tried again.",
                task=loading.task,
                row=text,
                run_id=loading.run_id,
            )
        if not isinstance(row, self.cls):
            raise PayloadError(
                f"task {loading.task!r}: {text} is a `{type(row).__name__}`, the task takes a `{self.cls.__name__}`.",
                task=loading.task,
                run_id=loading.run_id,
            )
        return row

    def _parse(self, stored: object) -> tuple[str, tuple[Any, ...]]:
        if not isinstance(stored, dict) or stored.keys() != {"$row", "key"}:
            raise ValueError("not a reference to a row")
        name, key = stored["$row"], stored["key"]
        if not any(mapper.class_.__name__ == name for mapper in self.mapper.base_mapper.self_and_descendants):
            raise ValueError(f"a reference to a row of another class than {self.cls.__name__}")
        if not isinstance(key, list) or len(key) != len(self._codecs):
            raise ValueError(f"a key of {self.cls.__name__} has {len(self._codecs)} part(s)")
        return name, tuple(_decode(part, codec) for part, codec in zip(key, self._codecs, strict=True))


_DELETED = ("is deleted, so that the task could not load its row", "pass plain data, read before the deletion")


# --- the parts of a key -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Codec:
    """How one Python type stands in a key: a JSON scalar, exactly."""

    name: str
    python_type: type
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def _plain(python_type: type) -> Callable[[Any], Any]:
    def decode(stored: object) -> object:
        if type(stored) is not python_type:
            raise ValueError("a key's part of the wrong type")
        return stored

    return decode


def _text(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    def decode(stored: object) -> object:
        if type(stored) is not str:
            raise ValueError("a key's part of the wrong type")
        try:
            return parse(stored)
        except (ValueError, ArithmeticError, KeyError, binascii.Error):
            # Without the cause: it would carry the value into the record.
            raise ValueError("a key's part that cannot be read") from None

    return decode


_MICROSECOND = dt.timedelta(microseconds=1)


def _finite(stored: object) -> float:
    if type(stored) not in {int, float} or not math.isfinite(cast("float", stored)):
        raise ValueError("a key's part of the wrong type")
    return float(cast("float", stored))


def _interval(stored: object) -> dt.timedelta:
    if type(stored) is not int:
        raise ValueError("a key's part of the wrong type")
    try:
        return stored * _MICROSECOND
    except OverflowError:
        raise ValueError("a key's part that cannot be read") from None


_INT = _Codec(name="int", python_type=int, encode=int, decode=_plain(int))
_STR = _Codec(name="str", python_type=str, encode=str.__str__, decode=_plain(str))
_BY_TYPE: dict[type, _Codec] = {
    codec.python_type: codec
    for codec in (
        _INT,
        _STR,
        _Codec(name="bool", python_type=bool, encode=bool, decode=_plain(bool)),
        _Codec(name="float", python_type=float, encode=float, decode=_finite),
        _Codec(name="uuid", python_type=uuid.UUID, encode=str, decode=_text(uuid.UUID)),
        _Codec(name="decimal", python_type=decimal.Decimal, encode=str, decode=_text(decimal.Decimal)),
        _Codec(
            name="datetime",
            python_type=dt.datetime,
            encode=dt.datetime.isoformat,
            decode=_text(dt.datetime.fromisoformat),
        ),
        _Codec(
            name="date",
            python_type=dt.date,
            encode=dt.date.isoformat,
            decode=_text(dt.date.fromisoformat),
        ),
        _Codec(
            name="time",
            python_type=dt.time,
            encode=dt.time.isoformat,
            decode=_text(dt.time.fromisoformat),
        ),
        _Codec(
            name="timedelta",
            python_type=dt.timedelta,
            encode=lambda value: value // _MICROSECOND,
            decode=_interval,
        ),
        _Codec(
            name="bytes",
            python_type=bytes,
            encode=lambda value: base64.b64encode(value).decode(),
            decode=_text(lambda stored: base64.b64decode(stored, validate=True)),
        ),
    )
}
_BY_NAME = {codec.name: codec for codec in _BY_TYPE.values()}


def _codec_of(column: sqlalchemy.ColumnElement[Any]) -> _Codec | None:
    """Return how parts of this column are written; None where its type does not say what Python type it holds."""
    try:
        python_type = column.type.python_type
    except NotImplementedError:
        return None
    if issubclass(python_type, enum.Enum):
        members = python_type
        return _Codec(
            name="enum",
            python_type=python_type,
            encode=lambda member: member.name,
            decode=_text(lambda name: members[name]),
        )
    return _BY_TYPE.get(python_type)


def _decode(part: object, codec: _Codec | None) -> object:
    if isinstance(part, dict) and part.keys() == {"$type", "value"}:
        tagged = _BY_NAME.get(part["$type"]) if isinstance(part["$type"], str) else None
        if tagged is None:
            raise ValueError("a key's part of an unknown type")
        return tagged.decode(part["value"])
    if codec is None:
        raise ValueError("a key's part without its type")
    return codec.decode(part)


class KeyCodec:
    """Writes whole keys of a mapped class as JSON and reads them back, for what goes on from a key.

    Args:
        mapper: Of the class.
    """

    def __init__(self, mapper: Mapper[Any]) -> None:
        self._name = mapper.class_.__name__
        self._codecs = [_codec_of(column) for column in mapper.primary_key]

    def write(self, key: tuple[Any, ...]) -> list[Any]:
        """Return *key* as JSON can carry it.

        Raises:
            HandOverError: If a part has a type that cannot be written exactly.
        """
        parts: list[Any] = []
        for value, codec in zip(key, self._codecs, strict=True):
            found = (_BY_TYPE[base] for base in type(value).__mro__ if base in _BY_TYPE)
            own = codec if codec is not None and type(value) is codec.python_type else next(found, None)
            if own is None:
                raise HandOverError(
                    f"The key of `{self._name}` has a part of type `{type(value).__qualname__}`, which cannot be "
                    "written exactly, so that nothing could go on from it."
                )
            part = own.encode(value)
            parts.append(part if own is codec else {"$type": own.name, "value": part})
        return parts

    def read(self, stored: list[Any]) -> tuple[Any, ...]:
        """Return the key that ``write`` wrote.

        Raises:
            ValueError: If it did not.
        """
        return tuple(_decode(part, codec) for part, codec in zip(stored, self._codecs, strict=True))
