"""One parameter of a task: how its values are written and checked, and what a refusal of one says."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import types
from typing import Any, Union, Unpack, get_args, get_origin
from uuid import UUID

import pydantic
import typing_extensions
from pydantic_core import PydanticSerializationError
from sqlalchemy.orm import Session

from aftercommit.errors import TaskDefinitionError, UnsafeArgument
from aftercommit.tasks.annotations import Fields, Rewriter
from aftercommit.tasks.equality import Difference, difference
from aftercommit.tasks.references import RowType, Writing, row_token
from aftercommit.tasks.unsafe import describe, find_unsafe, is_mapped_type, spell, steps_to

__all__ = ["Parameter", "Row"]

_TOKEN = re.compile(f'"{re.escape(row_token(""))}([0-9]+)"')
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_INT64 = 2**63


class Parameter:
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
        self._scalar = inner if alone and isinstance(inner, type) and inner in {int, str, bool, UUID} else None

    def _whole(self, hint: Any, annotation: Any) -> Any:
        if self.kind is inspect.Parameter.VAR_POSITIONAL:
            return types.GenericAlias(list, (hint,))
        if self.kind is inspect.Parameter.VAR_KEYWORD:
            return _unpacked(annotation) or types.GenericAlias(dict, (str, hint))
        return hint

    def write(self, value: Any, session: Session | None) -> list[str | Row]:
        """Return the pieces of this parameter's JSON, ``"name":value``; checks everything."""
        if self._row is not None and isinstance(value, self._row.cls):
            row = Row(self._row, value, self.name)
            self._check_row(row, session)
            return [f"{self._quoted}:", row]
        text = self._plain(value)
        if text is not None:
            return [f"{self._quoted}:{text}"]
        return self._write_by_pydantic(value, session)

    def _plain(self, value: Any) -> str | None:
        """JSON text of a plain scalar, or None where Pydantic is needed."""
        if value is None:
            return "null" if self._optional and (self._row or self._scalar) else None
        if type(value) is not self._scalar:
            return None
        scalar: Any = value  # of the class that was just compared
        if self._scalar is str:
            return json.dumps(value) if scalar.isascii() else None  # lone surrogates are Pydantic's to find
        if self._scalar is int:
            return str(value) if -_INT64 <= scalar < _INT64 else None
        if self._scalar is bool:
            return "true" if value else "false"
        return f'"{value}"'

    # --- by Pydantic --------------------------------------------------------------------------------------------

    def _write_by_pydantic(self, value: Any, session: Session | None) -> list[str | Row]:
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

    def _pieces(self, text: str, value: Any, context: Writing, session: Session | None) -> list[str | Row]:
        if not context.rows:
            return [text]
        pieces: list[str | Row] = []
        # re.split with a group: text, index, text, index, …, text
        for position, part in enumerate(_TOKEN.split(text)):
            if position % 2 == 0:
                pieces.append(part)
                continue
            reference, instance = context.rows[int(part)]
            row = Row(reference, instance, self.name, value)
            self._check_row(row, session)
            pieces.append(row)
        return pieces

    def _check_row(self, row: Row, session: Session | None) -> None:
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
        if "invalid utf-8 sequence" in str(exc):
            config = 'ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")'
            thing = f"{describe(value)} with bytes in it that are no text"
            return self._refused(path, thing, f"let the class that holds the bytes write base64: `{config}`")
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


class Row:
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


# --- small readings ---------------------------------------------------------------------------------------------


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """Return what is left of ``X | None``, and whether it was that."""
    if get_origin(annotation) in {Union, types.UnionType}:
        some = [member for member in get_args(annotation) if member is not types.NoneType]
        if len(some) == 1:
            return some[0], True
    return annotation, False


def _unpacked(annotation: Any) -> Any:
    """Return the TypedDict of ``**options: Unpack[Options]``."""
    return get_args(annotation)[0] if get_origin(annotation) in {Unpack, typing_extensions.Unpack} else None


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
