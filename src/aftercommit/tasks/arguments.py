"""How the arguments of a task cross: checked and written down at hand-over, read back in the run.

What crosses is JSON, made and read by Pydantic by the annotations. At hand-over it is read back at once, and what does
not come back as it was is refused: a ``SecretStr`` would arrive as stars. Rows cross by identity, which is read as late
as the commit, after the flush. Nothing here does I/O but `ArgumentPlan.load`.

Defaults that were not given are not stored: a task that waits through a deploy gets the default of the release that
runs it, as if it were called there, and a parameter that is added with a default fits what is already waiting.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin
from uuid import UUID

import pydantic
import typing_extensions
from pydantic_core import PydanticSerializationError, from_json
from sqlalchemy.orm import Session

from aftercommit.errors import PayloadError, TaskDefinitionError, UnsafeArgument
from aftercommit.tasks.annotations import Fields, Rewriter, function_parameters, resolve
from aftercommit.tasks.equality import Difference, difference
from aftercommit.tasks.references import Loading, RowType, Writing, row_token
from aftercommit.tasks.unsafe import describe, find_unsafe, is_mapped_type, spell, steps_to

__all__ = ["ArgumentPlan", "Handed"]

_TOKEN = re.compile(f'"{re.escape(row_token(""))}([0-9]+)"')
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_INT64 = 2**63
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


class _Parameter:
    """One parameter: how its values are written, checked and read."""

    def __init__(self, parameter: inspect.Parameter, annotation: Any, *, task: str) -> None:
        self.name = parameter.name
        self.kind = parameter.kind
        self.has_default = parameter.default is not parameter.empty
        self.default = parameter.default
        self._task = task
        self._quoted = json.dumps(parameter.name)
        rewriter = Rewriter(task=task, parameter=parameter.name)
        try:
            hint = self._whole(rewriter.rewrite(annotation), annotation)
            self.fields = Fields({self.name: hint})
        except (pydantic.errors.PydanticUserError, TypeError, NameError) as exc:
            raise TaskDefinitionError(
                f"task {task!r}: parameter `{parameter.name}: {_spelled(annotation)}` cannot be carried as JSON: "
                f"{str(exc).splitlines()[0]} Pass plain data (Pydantic models, dataclasses, what JSON knows); a row "
                "crosses by its key where the parameter itself is annotated with its class, not inside another type."
            ) from exc
        self.hint = hint
        self.annotation = annotation
        self.rows = tuple(rewriter.rows)
        # The two ways that nearly every argument takes, without Pydantic: a row, and a plain scalar.
        alone = parameter.kind in {*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY}
        inner, self._optional = _without_none(annotation)
        self._row = RowType(inner) if alone and is_mapped_type(inner) else None
        self._scalar = inner if alone and inner in {int, str, bool, UUID} else None

    def _whole(self, hint: Any, annotation: Any) -> Any:
        if self.kind is inspect.Parameter.VAR_POSITIONAL:
            return types.GenericAlias(list, (hint,))
        if self.kind is inspect.Parameter.VAR_KEYWORD:
            return _unpacked(annotation) or types.GenericAlias(dict, (str, hint))
        return hint

    def write(self, value: Any, session: Session | None) -> list[str | _Row]:
        """Return the pieces of this parameter's JSON, ``"name":value``; checks everything."""
        if self._row is not None and isinstance(value, self._row.cls):
            row = _Row(self._row, value, self.name)
            self._check_row(row, session)
            return [f"{self._quoted}:", row]
        text = self._plain(value)
        if text is not None:
            return [f"{self._quoted}:{text}"]
        return self._write_by_pydantic(value, session)

    def _plain(self, value: Any) -> str | None:
        if value is None:
            return "null" if self._optional and (self._row or self._scalar) else None
        if type(value) is not self._scalar:
            return None
        if self._scalar is str:
            return json.dumps(value) if value.isascii() else None  # lone surrogates are Pydantic's to find
        if self._scalar is int:
            return str(value) if -_INT64 <= value < _INT64 else None
        if self._scalar is bool:
            return "true" if value else "false"
        return f'"{value}"'

    # --- by Pydantic --------------------------------------------------------------------------------------------

    def _write_by_pydantic(self, value: Any, session: Session | None) -> list[str | _Row]:
        if self.kind is inspect.Parameter.VAR_POSITIONAL:
            value = list(value)
        found = find_unsafe(value, rows=self.rows)
        if found is not None:
            path = spell(self.name, found.steps)
            code = found.kind.code
            raise self._refused(path, f"{found.kind.thing} ({describe(found.value)})", found.kind.remedy, code=code)
        context = Writing()
        text = self._round_trip(value, context)
        return self._pieces(text[1:-1], value, context, session)

    def _round_trip(self, value: Any, context: Writing) -> str:
        """Return the JSON from which *value* comes back the same."""
        # Fields that were never set stay so where that is exact: `model_dump(exclude_unset=True)` in the task is
        # what it would be here. Where it is not (a default that is made anew each time), they are written.
        failed: Difference | Exception | None = None
        for unset in (True, False):
            try:
                text = self.fields.dump({self.name: value}, context, exclude_unset=unset)
                back = self.fields.load(text, context)[self.name]
            except (PydanticSerializationError, ValueError, RecursionError) as exc:
                failed = exc
                continue
            failed = difference(value, back, unset=unset)
            if failed is None:
                return text.decode()
        raise self._inexact(failed, value, context)

    def _pieces(self, text: str, value: Any, context: Writing, session: Session | None) -> list[str | _Row]:
        if not context.rows:
            return [text]
        pieces: list[str | _Row] = []
        # re.split with a group: text, index, text, index, …, text
        for position, part in enumerate(_TOKEN.split(text)):
            if position % 2 == 0:
                pieces.append(part)
                continue
            reference, instance = context.rows[int(part)]
            row = _Row(reference, instance, self.name, value)
            self._check_row(row, session)
            pieces.append(row)
        return pieces

    def _check_row(self, row: _Row, session: Session | None) -> None:
        problem = row.reference.refusal(row.instance, session)
        if problem is not None:
            why, remedy = problem
            thing = f"a `{type(row.instance).__name__}` that {why}"
            raise self._refused(row.path, thing, remedy, code="AC102")

    # --- refusals -----------------------------------------------------------------------------------------------

    def _inexact(self, failed: Difference | Exception | None, value: Any, context: Writing) -> UnsafeArgument:
        if isinstance(failed, Exception):
            return self._explain_failure(value, context, failed)
        return self._explain_difference(failed or ((), value, value))

    def _explain_failure(self, value: Any, context: Writing, exc: Exception) -> UnsafeArgument:
        """Say where *value* does not fit its annotation. Pydantic's own text would show the value: not chained."""
        path, inside, wanted = self.name, value, f"`{_spelled(self.annotation)}` is asked for"
        if isinstance(exc, RecursionError) or "Circular reference" in str(exc):
            return self._refused(path, f"{describe(value)} that contains itself", "pass it without the circle")
        invalid = self._invalid(value, context) or (exc if isinstance(exc, pydantic.ValidationError) else None)
        if invalid is not None:
            first = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
            steps, inside = _follow(value, first["loc"][1:])
            path = spell(self.name, steps)
            if first["type"] == "missing":
                wanted = f"its `{first['loc'][-1]}` is required, and is left out of its JSON"
            elif first["type"] not in {"value_error", "assertion_error"}:
                wanted = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        special = _special(inside)
        if special is not None:
            return self._refused(path, *special)
        return self._refused(
            path,
            f"{describe(inside)} that does not become JSON by its annotation, `{_spelled(self.annotation)}` ({wanted})",
            "nothing is converted on the way: pass that type, or annotate the parameter with the type you pass",
        )

    def _invalid(self, value: Any, context: Writing) -> pydantic.ValidationError | None:
        """Return what a strict look at *value* finds: unlike serialization, it knows the place."""
        try:
            self.fields.check({self.name: value}, context)
        except pydantic.ValidationError as invalid:
            return invalid
        except Exception:  # noqa: BLE001 - a validator of the user's: only the path is less exact then
            return None
        return None

    def _explain_difference(self, found: Difference) -> UnsafeArgument:
        steps, sent, back = found
        special = _special(sent)
        if special is not None:
            return self._refused(spell(self.name, steps), *special)
        if type(sent) is type(back):
            thing = f"{describe(sent)} that would arrive with another value (something in it is left out of its JSON)"
            remedy = "pass what the task needs as plain data"
        else:
            thing = f"{describe(sent)} that would arrive as {describe(back)}"
            remedy = f"annotate it with the type you pass, or pass a {describe(back)}: nothing is converted on the way"
        return self._refused(spell(self.name, steps), thing, remedy)

    def _refused(self, path: str, thing: str, remedy: str, *, code: str = "AC109") -> UnsafeArgument:
        return UnsafeArgument(
            f"task {self._task!r}: `{path}` is {thing}, which cannot cross to a task. Instead: {remedy}.",
            task=self._task,
            parameter=path,
            thing=thing,
            code=code,
        )


class _Row:
    """An instance at its place in the JSON, until its identity is read."""

    __slots__ = ("_name", "_root", "instance", "reference")

    def __init__(self, reference: RowType, instance: object, name: str, root: object = None) -> None:
        self.reference = reference
        self.instance = instance
        self._name = name
        self._root = instance if root is None else root

    def write(self, task: str) -> str:
        """Return the reference, by the identity that the instance has now."""
        return self.reference.write(self.instance, task=task, path=lambda: self.path)

    @property
    def path(self) -> str:
        """The way to the instance: looked for only when there is something to tell."""
        return spell(self._name, steps_to(self._root, self.instance))


class Handed:
    """Arguments that passed every check; only the identities of rows are still open."""

    __slots__ = ("_max_bytes", "_pieces", "_task")

    def __init__(self, pieces: list[str | _Row], *, task: str, max_bytes: int) -> None:
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

    parameters: dict[str, _Parameter]
    signature: inspect.Signature
    positional: list[_Parameter] | None  # what a call by position only fills, where the signature is that simple
    fields: Fields


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
        pieces: list[str | _Row] = ["{"]
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
            RowGone: If a row no longer exists.
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

    # --- ours ---------------------------------------------------------------------------------------------------

    def _prepared(self) -> _Prepared:
        with self._lock:
            if self._made is None:
                self._made = self._prepare()
            return self._made

    def _prepare(self) -> _Prepared:
        found = function_parameters(self._function, skip_first=self._skip_first)
        hints = resolve(self._function, found, task=self._task)
        parameters = {name: _Parameter(it, hints[name], task=self._task) for name, it in found.items()}
        return _Prepared(
            parameters=parameters,
            signature=inspect.Signature([it.replace(annotation=it.empty) for it in found.values()]),
            positional=list(parameters.values()) if all(it.kind in _POSITIONAL for it in found.values()) else None,
            fields=Fields({name: parameter.hint for name, parameter in parameters.items()}),
        )

    def _bind(self, made: _Prepared, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            return made.signature.bind(*args, **kwargs).arguments
        except TypeError as exc:
            raise TypeError(f"task {self._task!r}: {exc}") from None

    def _call(
        self, made: _Prepared, values: dict[str, Any], run_id: UUID | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


# --- small readings ---------------------------------------------------------------------------------------------


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


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """Return what is left of ``X | None``, and whether it was that."""
    if get_origin(annotation) in {Union, types.UnionType}:
        some = [member for member in get_args(annotation) if member is not types.NoneType]
        if len(some) == 1:
            return some[0], True
    return annotation, False


def _unpacked(annotation: Any) -> Any:
    """Return the TypedDict of ``**options: Unpack[Options]``."""
    return get_args(annotation)[0] if get_origin(annotation) is typing_extensions.Unpack else None


def _spelled(annotation: Any) -> str:
    """Return an annotation as a user would write it."""
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation.__name__
    return re.sub(r"\b(?:typing|collections\.abc|builtins)\.", "", str(annotation))


def _follow(value: Any, loc: tuple[int | str, ...]) -> tuple[tuple[str, ...], Any]:
    """Walk down *value* along Pydantic's *loc*, as far as it leads: names of union members are no steps."""
    steps: list[str] = []
    for part in loc:
        if isinstance(value, dict) and part in value:
            value = value[part]
            steps.append(f"[{part!r}]")
        elif isinstance(part, int) and isinstance(value, (list, tuple)) and part < len(value):
            value = value[part]
            steps.append(f"[{part}]")
        elif isinstance(part, str) and part in (getattr(value, "__dict__", None) or {}):
            value = value.__dict__[part]
            steps.append(f".{part}")
    return tuple(steps), value


def _special(value: object) -> tuple[str, str] | None:
    """Return what to say of values that people trip over."""
    if isinstance(value, (pydantic.SecretStr, pydantic.SecretBytes)):
        return (
            f"a {describe(value)}, whose JSON is stars",
            "let the task read the secret where this code read it, or pass the id of the row that holds it",
        )
    if isinstance(value, float) and not math.isfinite(value):
        return (
            "a number that JSON does not have (nan or infinity)",
            "pass None for it, and `float | None` as annotation",
        )
    if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)):
        return f"{describe(value)}, code", "pass what the task needs to choose by itself, such as a name or an `Enum`"
    return None


def _problems(exc: Exception) -> str:
    """Return what Pydantic found, at most three of it, without the values."""
    if not isinstance(exc, pydantic.ValidationError):
        return "this is not JSON" if type(exc) is ValueError else f"reading them raised {type(exc).__name__}"
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    spelled = []
    for error in errors[:3]:
        where = ".".join(str(part) for part in error["loc"]) or "all of it"
        if error["type"] == "json_invalid":
            spelled.append("this is not JSON")
        elif error["type"] in _WITHOUT_VALUES:
            spelled.append(f"`{where}`: {error['msg']}")
        else:
            spelled.append(f"`{where}`: {error['type']}")
    more = len(errors) - len(spelled)
    return "; ".join(spelled) + (f"; and {more} more" if more > 0 else "")
