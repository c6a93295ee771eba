"""What a task's annotations mean here: resolved, and rewritten where Pydantic alone would not be exact.

Two things are put in place of what the user wrote: a mapped class becomes a reference to a row, and a union whose
JSON does not tell its members apart (``str | UUID``) writes down which member it was.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import typing_extensions
from pydantic_core import (
    PydanticSerializationError,
    PydanticSerializationUnexpectedValue,
    core_schema,
    from_json,
    to_json,
)

from aftercommit.errors import TaskDefinitionError
from aftercommit.tasks.equality import difference
from aftercommit.tasks.references import RowType
from aftercommit.tasks.unsafe import is_mapped_type, recognise

__all__ = ["Fields", "Rewriter", "function_parameters", "resolve"]

# Base64 for bytes, so that they need not be text; nothing else: this reaches standard dataclasses and TypedDicts
# inside, whose users did not ask for more.
_CONFIG = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


class Fields:
    """Writes and reads a JSON object of named values, any of which may be missing.

    A model even around a single value: Pydantic refuses a configuration beside a class that may have one, and hands
    that of a model on to the standard dataclasses inside it.
    """

    def __init__(self, hints: dict[str, Any]) -> None:
        # Numbered, with the names as aliases: a parameter may be called `schema`, `_x` or `model_config`.
        self._places = {name: f"a{place}" for place, name in enumerate(hints)}
        fields: dict[str, Any] = {
            place: (
                hints[name],
                pydantic.Field(default=None, alias=name, validation_alias=name, serialization_alias=name),
            )
            for name, place in self._places.items()
        }
        self._model: type[pydantic.BaseModel] = pydantic.create_model("Arguments", __config__=_CONFIG, **fields)
        self._serializer = self._model.__pydantic_serializer__
        self._validator = self._model.__pydantic_validator__

    def dump(self, values: dict[str, Any], context: object, *, exclude_unset: bool) -> bytes:
        """Return *values* as JSON; a value that is not of its type is an error."""
        return self._serializer.to_json(
            self._model.model_construct(**values),
            by_alias=True,
            exclude_unset=exclude_unset,
            exclude=None if exclude_unset else self._without(values),
            warnings="error",
            context=context,
        )

    def load(self, text: str | bytes, context: object) -> dict[str, Any]:
        """Return the values in *text*; keys that are no names are ignored."""
        return self._given(self._validator.validate_json(text, context=context))

    def check(self, values: dict[str, Any], context: object) -> dict[str, Any]:
        """Return *values* if they are of their types, as Python objects: a failure says where."""
        return self._given(self._validator.validate_python(values, strict=True, context=context))

    def _without(self, values: dict[str, Any]) -> set[str] | None:
        return {place for name, place in self._places.items() if name not in values} or None

    def _given(self, model: Any) -> dict[str, Any]:
        given = model.__pydantic_fields_set__
        return {name: getattr(model, place) for name, place in self._places.items() if place in given}


# --- resolving --------------------------------------------------------------------------------------------------


def function_parameters(function: Callable[..., Any], *, skip_first: bool) -> dict[str, inspect.Parameter]:
    """Return the parameters of *function* by name, without the injected session."""
    options: dict[str, Any] = {}
    if sys.version_info >= (3, 14):
        import annotationlib

        options["annotation_format"] = annotationlib.Format.FORWARDREF
    parameters = list(inspect.signature(function, **options).parameters.values())
    return {parameter.name: parameter for parameter in parameters[skip_first:]}


def resolve(function: Callable[..., Any], parameters: dict[str, inspect.Parameter], *, task: str) -> dict[str, Any]:
    """Return the annotation of each parameter, names in quotes looked up; ``Any`` where there is none.

    Raises:
        TaskDefinitionError: If a name cannot be found.
    """
    scope = _scope(function)
    return {
        name: Any if parameter.annotation is parameter.empty else _resolve_one(parameter, scope, task)
        for name, parameter in parameters.items()
    }


def _scope(function: Callable[..., Any]) -> dict[str, Any]:
    """The names that annotations may use: the module's, and those that the function has closed over."""
    inner: Any = inspect.unwrap(function)
    inner = getattr(inner, "__func__", inner)
    if not isinstance(inner, types.FunctionType):
        inner = getattr(type(inner), "__call__", inner)  # noqa: B004 - not whether it is callable: what is called
    scope = dict(getattr(inner, "__globals__", {}))
    code = getattr(inner, "__code__", None)
    for name, cell in zip(code.co_freevars if code else (), getattr(inner, "__closure__", None) or (), strict=False):
        try:
            scope[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for parameter in getattr(inner, "__type_params__", ()):
        scope[parameter.__name__] = parameter
    return scope


def _resolve_one(parameter: inspect.Parameter, scope: dict[str, Any], task: str) -> Any:
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        return typing.get_type_hints(holder, globalns=scope, include_extras=True)["it"]
    except NameError as exc:
        missing = exc.name or str(exc)
        raise TaskDefinitionError(
            f"task {task!r}: the annotation of parameter `{parameter.name}` uses `{missing}`, which cannot be found "
            f"at run time. Import it in the task's module itself, not under `if TYPE_CHECKING`, and define it at the "
            "module's level, not inside a function."
        ) from exc
    except (TypeError, SyntaxError, AttributeError) as exc:
        raise TaskDefinitionError(
            f"task {task!r}: the annotation of parameter `{parameter.name}` cannot be read: {exc}. "
            "Write a type that exists at run time."
        ) from exc


# --- rewriting --------------------------------------------------------------------------------------------------

_ONCE_ONLY = frozenset({"Iterable", "Iterator", "Generator", "AsyncIterable", "AsyncIterator", "AsyncGenerator"})
_NO_DATA = frozenset({"Callable", "Awaitable", "Coroutine", "type"})
# `type X = …` makes another class than the one for older Pythons.
_ALIASES: tuple[Any, ...] = (
    typing_extensions.TypeAliasType,
    getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType),
)
_NATIVE = frozenset({str, int, float, bool})


class Rewriter:
    """Rewrites the annotation of one parameter; what it met on the way stays with it.

    Attributes:
        rows: The mapped classes whose instances may stand in a value.
    """

    def __init__(self, *, task: str, parameter: str) -> None:
        self.rows: list[type] = []
        self._where = f"task {task!r}: parameter `{parameter}`"
        self._aliases: dict[int, Any] = {}

    def rewrite(self, hint: Any) -> Any:  # noqa: PLR0911 - one for each kind of annotation
        """Return *hint* for Pydantic: the same object where nothing had to be changed.

        Raises:
            TaskDefinitionError: If the annotation names what never crosses.
        """
        if is_mapped_type(hint):
            self.rows.append(hint)
            return Annotated[Any, RowType(hint)]
        if isinstance(hint, _ALIASES):
            return self._alias(hint)
        if isinstance(hint, typing.NewType):
            inner = self.rewrite(hint.__supertype__)
            return hint if inner is hint.__supertype__ else inner
        origin, arguments = get_origin(hint), get_args(hint)
        self._refuse(origin or hint)
        if origin is Annotated:
            return self._annotated(hint, arguments)
        if origin in {Union, types.UnionType}:
            return self._union(hint, arguments)
        if origin is None or origin is Literal or not arguments or isinstance(origin, _ALIASES):
            return hint
        return self._generic(hint, origin, arguments)

    def _refuse(self, cls: Any) -> None:
        name = getattr(cls, "__name__", "")
        if getattr(cls, "__module__", "") in {"collections.abc", "builtins"}:
            if name in _ONCE_ONLY:
                raise TaskDefinitionError(
                    f"{self._where} is an `{name}`: one that can be read only once does not cross. "
                    "Annotate it `list[…]`."
                )
            if name in _NO_DATA:
                raise TaskDefinitionError(
                    f"{self._where} is a `{name}`: code does not cross to a task, data does. "
                    "Pass what the task needs to choose by itself, such as a name or an `Enum`."
                )
        unsafe = recognise(cls) if isinstance(cls, type) and cls not in _NATIVE else None
        if unsafe is not None:
            raise TaskDefinitionError(
                f"{self._where} is annotated with {unsafe.thing} (`{cls.__module__}.{name}`), which cannot cross to "
                f"a task [{unsafe.code}]: {unsafe.remedy}."
            )

    def _alias(self, alias: Any) -> Any:
        if id(alias) not in self._aliases:
            self._aliases[id(alias)] = alias  # inside itself, a recursive one stays as it is
            inner = self.rewrite(alias.__value__)
            self._aliases[id(alias)] = alias if inner is alias.__value__ else inner
        return self._aliases[id(alias)]

    def _annotated(self, hint: Any, arguments: tuple[Any, ...]) -> Any:
        if any(getattr(extra, "discriminator", None) is not None for extra in arguments[1:]):
            return hint  # the members tell themselves apart
        inner = self.rewrite(arguments[0])
        return hint if inner is arguments[0] else Annotated[(inner, *arguments[1:])]

    def _union(self, hint: Any, arguments: tuple[Any, ...]) -> Any:
        before = len(self.rows)
        members = tuple(self.rewrite(member) for member in arguments)
        some = [member for member in members if member is not types.NoneType]
        if len(some) > 1 and (len(self.rows) > before or not _are_told_apart_by_json(some)):
            return Annotated[Any, TaggedUnion(arguments, members)]
        return hint if all(map(_is, members, arguments)) else Union[members]  # noqa: UP007 - made at run time

    def _generic(self, hint: Any, origin: Any, arguments: tuple[Any, ...]) -> Any:
        before = len(self.rows)
        members = tuple(self._argument(argument) for argument in arguments)
        name = getattr(origin, "__name__", "")
        if len(self.rows) > before and ("Set" in name or "set" in name or is_hashed_row(members, arguments, name)):
            raise TaskDefinitionError(
                f"{self._where} puts rows where they are hashed and compared, which reads their attributes. "
                f"Annotate it `list[{self.rows[-1].__name__}]`."
            )
        if all(map(_is, members, arguments)):
            return hint
        try:
            return origin[members]
        except TypeError as exc:
            raise TaskDefinitionError(f"{self._where}: `{hint}` cannot hold rows here. Use a list or a dict.") from exc

    def _argument(self, argument: Any) -> Any:
        # `...` in a tuple, the list of parameters in a Callable: no types.
        return argument if argument is ... or isinstance(argument, list) else self.rewrite(argument)


def is_hashed_row(members: tuple[Any, ...], arguments: tuple[Any, ...], name: str) -> bool:
    """Tell whether a rewritten mapping has rows in its keys."""
    return ("dict" in name.lower() or "Mapping" in name) and members[0] is not arguments[0]


def _is(one: object, other: object) -> bool:
    return one is other


def _are_told_apart_by_json(members: list[Any]) -> bool:
    """Tell whether each value of these can be of one member only, by its kind in JSON."""
    kinds: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            if not all(type(value) in _NATIVE for value in get_args(member)):
                return False
        elif isinstance(member, type) and member in _NATIVE:
            kinds.append(member.__name__)
        elif get_origin(member) is list or member is list:
            kinds.append("array")
        elif get_origin(member) is dict or member is dict:
            kinds.append("object")
        else:
            return False
    return len(set(kinds)) == len(kinds)


class TaggedUnion:
    """A union that stores which member its value was: ``{"$is": "UUID", "value": "…"}``.

    By the member's name, so that ``str | UUID`` may become ``UUID | str | None`` while tasks are waiting. What an
    older release stored without a tag, when the annotation was no union yet, is read as Pydantic reads unions.
    """

    def __init__(self, originals: tuple[Any, ...], members: tuple[Any, ...]) -> None:
        self._members: dict[str, Fields] = {}
        self._optional = types.NoneType in members
        for original, member in zip(originals, members, strict=True):
            if member is types.NoneType:
                continue
            label = base = _label(original)
            while label in self._members:
                label = f"{base}#{len(self._members)}"
            self._members[label] = Fields({"value": member})
        self._plain = Fields({"value": Union[members]})  # noqa: UP007 - made at run time

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> core_schema.CoreSchema:
        """Write with a tag, read by it."""
        return core_schema.with_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(self._write, info_arg=True),
        )

    def _write(self, value: object, info: core_schema.SerializationInfo) -> object:
        if value is None and self._optional:
            return None
        for unset in (True, False):
            for label, fields in self._likely_first(value):
                stored = _attempt(fields, value, info.context, unset=unset)
                if stored is not None:
                    return {"$is": label, **from_json(stored)}
        raise PydanticSerializationUnexpectedValue("no member of the union carries this value exactly")

    def _likely_first(self, value: object) -> Iterator[tuple[str, Fields]]:
        own = _label(type(value))
        if own in self._members:
            yield own, self._members[own]
        yield from ((label, fields) for label, fields in self._members.items() if label != own)

    def _read(self, value: object, info: core_schema.ValidationInfo) -> object:
        if info.mode == "python":  # only to say where a value went wrong
            return self._plain.check({"value": value}, info.context)["value"]
        fields = self._plain
        if isinstance(value, dict) and value.keys() == {"$is", "value"}:
            tagged = self._members.get(value["$is"]) if isinstance(value["$is"], str) else None
            if tagged is not None:
                fields, value = tagged, value["value"]
        return fields.load(to_json({"value": value}), info.context)["value"]


def _attempt(fields: Fields, value: object, context: object, *, unset: bool) -> bytes | None:
    """Return the JSON that carries *value* exactly as a member of a union, None if there is none."""
    try:
        stored = fields.dump({"value": value}, context, exclude_unset=unset)
        back = fields.load(stored, context)["value"]
    except (PydanticSerializationError, ValueError):
        return None
    return stored if difference(value, back, unset=unset) is None else None


def _label(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is None and hasattr(hint, "__name__"):
        return str(hint.__name__)
    return str(hint)
