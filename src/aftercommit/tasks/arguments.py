"""How the arguments of a task cross: checked and written down at hand-over, read back in the run.

What crosses is JSON, made and read by Pydantic by the annotations. At hand-over it is read back at once, and what does
not come back as it was is refused: a ``SecretStr`` would arrive as stars. Rows cross by identity, which is read as late
as the commit, after the flush. Nothing here does I/O but `ArgumentPlan.load`.

Defaults that were not given are not stored: a task that waits through a deploy gets the default of the release that
runs it, as if it were called there, and a parameter that is added with a default fits what is already waiting.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pydantic
from pydantic_core import from_json
from sqlalchemy.orm import Session

from aftercommit.errors import PayloadError, UnsafeArgument
from aftercommit.tasks.annotations import Fields, function_parameters, resolve
from aftercommit.tasks.parameters import Parameter, Row
from aftercommit.tasks.references import Loading
from aftercommit.tasks.unsafe import describe, recognise

__all__ = ["ArgumentPlan", "Handed"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Kinds of errors whose message tells the type that was wanted, and nothing of the value.
_WITHOUT_VALUES = frozenset(
    f"{name}_type"
    for name in [
        "int",
        "float",
        "string",
        "bool",
        "bytes",
        "date",
        "datetime",
        "time",
        "uuid",
        "list",
        "dict",
        "tuple",
        "set",
        "decimal",
    ]
) | {"missing", "enum", "literal_error", "int_parsing", "int_from_float", "uuid_parsing", "decimal_parsing"}


# What validators raise, Pydantic's and the user's. Not what the database does: that may pass by itself.
_READING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class Handed:
    """Arguments that passed every check; only the identities of rows are still open."""

    __slots__ = ("_max_bytes", "_pieces", "_task")

    def __init__(self, pieces: list[str | Row], *, task: str, max_bytes: int) -> None:
        self._pieces = pieces
        self._task = task
        self._max_bytes = max_bytes
        _check_size("".join([piece for piece in pieces if type(piece) is str]), max_bytes, task)

    def resolve(self) -> str:
        """Return the JSON, with the identities that rows have now: call it after the flush, before the COMMIT.

        No I/O. May be called again: identities are read each time.

        Raises:
            HandOverError: If an instance has no row after all.
            UnsafeArgument: If the keys make it too large.
        """
        text = "".join([piece if isinstance(piece, str) else piece.write(self._task) for piece in self._pieces])
        _check_size(text, self._max_bytes, self._task)
        return text


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Everything that is made once for a task."""

    parameters: dict[str, Parameter]
    signature: inspect.Signature
    positional: list[Parameter] | None  # what a call by position only fills, where the signature is that simple
    fields: Fields
    has_rows: bool


class ArgumentPlan:
    """How the arguments of one task cross: made once per task, at its first use (forward references), by any thread.

    Args:
        function: The task's function.
        task: Its name, for messages.
        skip_first: Whether the first parameter is the session, which is injected and never stored.
    """

    def __init__(self, function: Callable[..., Any], *, task: str, skip_first: bool) -> None:
        self._function = function
        self._task = task
        self._skip_first = skip_first
        self._lock = threading.Lock()
        self._made: _Prepared | None = None

    def prepare(self) -> None:
        """Resolve the annotations and build what writes and reads them. Doing it twice is free.

        Raises:
            TaskDefinitionError: If a parameter cannot be carried as JSON, or a name in an annotation is unknown.
        """
        self._prepared()

    def hand_over(
        self, session: Session | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, max_bytes: int
    ) -> Handed:
        """Check the arguments of one call and write them down, all but the identities of rows.

        No I/O; flushes nothing and touches no attribute of a mapped instance.

        Args:
            session: The asker's session; None where there is no transaction to wait for.
            args: As the task was called, without its session.
            kwargs: As the task was called.
            max_bytes: The most that the JSON may take, in UTF-8.

        Raises:
            TypeError: If the function cannot be called like this.
            UnsafeArgument: If an argument cannot cross.
        """
        made = self._made or self._prepared()
        pieces: list[str | Row] = ["{"]
        if made.positional is not None and not kwargs and len(args) == len(made.positional):
            for parameter, value in zip(made.positional, args, strict=True):
                pieces += parameter.write(value, session)
                pieces.append(",")
        else:
            for name, value in self._bind(made, args, kwargs).items():
                pieces += made.parameters[name].write(value, session)
                pieces.append(",")
        if len(pieces) > 1:
            pieces.pop()
        pieces.append("}")
        return Handed(pieces, task=self._task, max_bytes=max_bytes)

    def load(
        self, session: Session | None, text: str, *, run_id: UUID | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for the call, without the session; rows are loaded in *session*.

        Args:
            session: The run's session. Async code calls this through ``run_sync``.
            text: What `Handed.resolve` returned, perhaps long ago, perhaps tampered with.
            run_id: The run, for errors.

        Raises:
            RowGone: If a row is gone, or not visible to the session.
            PayloadError: If *text* does not fit the task (any more). No value of it is in the message.
        """
        made = self._made or self._prepared()
        try:
            stored = from_json(text)
            unknown = stored.keys() - made.parameters.keys() if isinstance(stored, dict) else set[str]()
            values = {} if unknown else made.fields.load(text, Loading(session, self._task, run_id))
        except _READING as exc:
            raise PayloadError(
                f"task {self._task!r}: its stored arguments do not fit its signature: {_problems(exc)}. They were "
                "changed, or the task was, after they were stored.",
                task=self._task,
                run_id=run_id,
            ) from None  # the cause shows the values
        if unknown:
            raise PayloadError(
                f"task {self._task!r}: {', '.join(f'`{name}`' for name in sorted(unknown))} stored with it, which it "
                "does not take: a newer release stored this, or the parameter was removed while tasks were waiting. "
                "Keep such a parameter, with a default, until none is left.",
                task=self._task,
                run_id=run_id,
            )
        return self._call(made, values, run_id)

    @property
    def has_rows(self) -> bool:
        """Whether ``load`` may ask the database, so that async code must call it through ``run_sync``."""
        return (self._made or self._prepared()).has_rows

    # --- ours ---------------------------------------------------------------------------------------------------

    def _prepared(self) -> _Prepared:
        with self._lock:
            if self._made is None:
                self._made = self._prepare()
            return self._made

    def _prepare(self) -> _Prepared:
        found = function_parameters(self._function, skip_first=self._skip_first)
        hints = resolve(self._function, found, task=self._task)
        parameters = {name: Parameter(it, hints[name], task=self._task) for name, it in found.items()}
        return _Prepared(
            parameters=parameters,
            signature=inspect.Signature([it.replace(annotation=it.empty) for it in found.values()]),
            positional=list(parameters.values()) if all(it.kind in _POSITIONAL for it in found.values()) else None,
            fields=Fields({name: parameter.hint for name, parameter in parameters.items()}),
            has_rows=any(parameter.rows for parameter in parameters.values()),
        )

    def _bind(self, made: _Prepared, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            return made.signature.bind(*args, **kwargs).arguments
        except TypeError as exc:
            self._refuse_session(args, kwargs)
            raise TypeError(f"task {self._task!r}: {exc}") from None

    def _refuse_session(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Say why a call does not fit, if it is for the session that people pass along by habit."""
        named = [(f"argument {place}", value) for place, value in enumerate(args, start=1)] + list(kwargs.items())
        for name, value in named:
            kind = recognise(type(value))
            if kind is not None and kind.code == "AC101":
                raise UnsafeArgument(
                    f"task {self._task!r}: `{name}` is {kind.thing} ({describe(value)}), which cannot cross to a task. "
                    f"Instead: {kind.remedy}.",
                    task=self._task,
                    parameter=name,
                    thing=kind.thing,
                    code=kind.code,
                )

    def _call(
        self, made: _Prepared, values: dict[str, Any], run_id: UUID | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if made.positional is not None and len(values) == len(made.positional):
            # They come in the order of the parameters.
            return tuple(values.values()), {}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        by_position = True
        followed = any(
            it.kind is inspect.Parameter.VAR_POSITIONAL and values.get(it.name) for it in made.parameters.values()
        )
        for name, parameter in made.parameters.items():
            given = name in values
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(values.get(name, ()))
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(values.get(name, {}))
            elif not given and not parameter.has_default:
                raise PayloadError(
                    f"task {self._task!r}: its stored arguments have no `{name}`, which it needs: the parameter was "
                    "added after they were stored. Give it a default.",
                    task=self._task,
                    run_id=run_id,
                )
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if given:
                    kwargs[name] = values[name]
            elif given or followed:
                # Once a default was left out, what follows can only be named.
                if by_position:
                    args.append(values[name] if given else parameter.default)
                else:
                    kwargs[name] = values[name]
            else:
                by_position = False
        return tuple(args), kwargs


def _check_size(text: str, max_bytes: int, task: str) -> None:
    size = len(text) if text.isascii() else len(text.encode())
    if size > max_bytes:
        raise UnsafeArgument(
            f"task {task!r}: its arguments take {size} bytes of JSON, and {max_bytes} are allowed: every run would "
            "read them again. Store them in a row and pass the row.",
            task=task,
            parameter="",
            thing=f"{size} bytes of JSON",
        )


def _problems(exc: Exception) -> str:
    """Return what Pydantic found, at most three of it, without the values."""
    if not isinstance(exc, pydantic.ValidationError):
        return "this is not JSON" if type(exc) is ValueError else f"reading them raised {type(exc).__name__}"
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    spelled = []
    for error in errors[:3]:
        # No other names on the way: the keys of a dictionary are values, too.
        where = "".join(f"[{part}]" if isinstance(part, int) else "" for part in error["loc"][1:])
        where = f"{error['loc'][0]}{where}" if error["loc"] else "all of it"
        if error["type"] == "json_invalid":
            spelled.append("this is not JSON")
        elif error["type"] in _WITHOUT_VALUES:
            spelled.append(f"`{where}`: {error['msg']}")
        else:
            spelled.append(f"`{where}`: {error['type']}")
    more = len(errors) - len(spelled)
    return "; ".join(spelled) + (f"; and {more} more" if more > 0 else "")
