"""Classes of the project: their bases, their members, and whether they are mapped."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import library
from aftercommit_check.facts.values import UNKNOWN, Kind, Origin, Value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aftercommit_check.facts.infer import Evaluator
    from aftercommit_check.index.scopes import Binding, Class, Function

MAPPED_BASES = frozenset(
    {
        "DeclarativeBase", "DeclarativeBaseNoMeta", "MappedAsDataclass", "SQLAlchemyBaseUserTable",
        "SQLAlchemyBaseUserTableUUID", "SQLAlchemyBaseOAuthAccountTable", "SQLAlchemyBaseOAuthAccountTableUUID",
        "SQLAlchemyBaseAccessTokenTable", "SQLAlchemyBaseAccessTokenTableUUID", "UUIDBase", "UUIDAuditBase",
        "BigIntBase", "BigIntAuditBase", "declarative_base",
    }
)  # fmt: skip
MAPPING_DECORATORS = frozenset({"mapped", "mapped_as_dataclass", "as_declarative"})


def bases(ev: Evaluator, cls: Class) -> list[Value]:
    """Return the bases of *cls*: classes of the project with their type arguments, or external names."""
    found = []
    for node in cls.base_nodes:
        scope = cls.parent or cls
        value = ev.infer(node, scope)
        found.append(value)
    return found


def lineage(ev: Evaluator, cls: Class, seen: set[Class] | None = None) -> Iterator[Class]:
    """Yield *cls* and its bases, depth first, each once."""
    seen = set() if seen is None else seen
    if cls in seen or len(seen) > 40:
        return
    seen.add(cls)
    yield cls
    for base in bases(ev, cls):
        if base.kind is Kind.CLASS and base.cls is not None:
            yield from lineage(ev, base.cls, seen)


def external_bases(ev: Evaluator, cls: Class) -> set[str]:
    """Return the names of all bases that are not of this project."""
    return {base.name for part in lineage(ev, cls) for base in bases(ev, part) if base.kind is Kind.EXTERNAL}


def is_mapped(ev: Evaluator, cls: Class) -> bool:
    """Return whether instances of *cls* are rows that belong to a session."""
    key = (cls, "mapped")
    if key not in ev.class_facts:
        ev.class_facts[key] = False
        ev.class_facts[key] = _is_mapped(ev, cls)
    return ev.class_facts[key]


def _is_mapped(ev: Evaluator, cls: Class) -> bool:
    table = cls.keyword("table")
    if isinstance(table, ast.Constant):
        return bool(table.value)
    external = external_bases(ev, cls)
    if any(name.rpartition(".")[2] == "SQLModel" for name in external):
        return False  # a SQLModel class without table=True is a schema
    if any(MAPPING_DECORATORS & {_last(decorator)} for decorator in cls.node.decorator_list):
        return True
    for part in lineage(ev, cls):
        if "__tablename__" in part.bindings or "__table__" in part.bindings:
            return True
        if any(MAPPING_DECORATORS & {_last(decorator)} for decorator in part.node.decorator_list):
            return True
    for name in external:
        last = name.rpartition(".")[2]
        if last in MAPPED_BASES or name.startswith("sqlalchemy.orm.decl"):
            return True
        if last == "Model" and name.rpartition(".")[0].endswith("db"):
            return True  # Flask-SQLAlchemy's `db.Model`
    if any(base.kind in (Kind.UNKNOWN, Kind.OBJECT) for base in bases(ev, cls)) or any(
        name.startswith("?") or name.rpartition(".")[2] in ("Base", "BaseModel_", "Model") for name in external
    ):
        return _has_columns(cls)
    return False


def _has_columns(cls: Class) -> bool:
    """Return whether the class body declares columns, for classes whose base cannot be found."""
    return any(
        isinstance(binding.value, ast.Call) and _last(binding.value.func) in ("Column", "mapped_column", "relationship")
        for bindings in cls.bindings.values()
        for binding in bindings
    )


def is_session_class(ev: Evaluator, cls: Class) -> bool | None:
    """Return whether *cls* is a session: None if not, else whether it is an asynchronous one."""
    for name in external_bases(ev, cls):
        value = library.external_instance(name)
        if value.kind is Kind.SESSION:
            return bool(value.is_async)
    return None


def instance(ev: Evaluator, cls: Class, args: tuple[Value, ...] = (), **more: object) -> Value:
    """Return an instance of *cls*; of a session class, a session."""
    key = (cls, "session")
    if key not in ev.class_facts:
        ev.class_facts[key] = is_session_class(ev, cls) is not None
    if ev.class_facts[key]:
        return Value(Kind.SESSION, cls=cls, is_async=is_session_class(ev, cls), origin=Origin.UNKNOWN)
    return Value(Kind.INSTANCE, cls=cls, args=args, mapped=is_mapped(ev, cls), name=cls.name).but(**more)


def find_method(ev: Evaluator, cls: Class, name: str) -> Function | None:
    """Return the method *name* of *cls* or of a base."""
    return next((part.methods[name] for part in lineage(ev, cls) if name in part.methods), None)


def implementations(ev: Evaluator, cls: Class) -> list[Class]:
    """Return the classes of the project that derive from *cls*, by the names in their class statements."""
    found = []
    for path, name in ev.project.subclasses(cls.name)[:4]:
        module = ev.project.load(path)
        if module is None:
            continue
        value = ev.member(module, name)
        if value.kind is Kind.CLASS and value.cls is not None and cls in set(lineage(ev, value.cls)):
            found.append(value.cls)
    return found


def find_members(ev: Evaluator, cls: Class, name: str) -> Iterator[tuple[Class, Binding]]:
    """Yield what binds *name* in the class bodies of *cls* and its bases, nearest first."""
    for part in lineage(ev, cls):
        bindings = part.bindings.get(name)
        if bindings:
            yield part, bindings[-1]


def type_mapping(ev: Evaluator, cls: Class, args: tuple[Value, ...], target: Class, depth: int = 0) -> dict[str, Value]:
    """Return what the type variables of *target* are, for an instance of ``cls[args]``."""
    own = dict(zip(type_parameters(cls), args, strict=False))
    if cls is target or depth > 8:
        return own
    for node in cls.base_nodes:
        scope = cls.parent or cls
        base = ev.infer(node.value if isinstance(node, ast.Subscript) else node, scope)
        if base.kind is not Kind.CLASS or base.cls is None or target not in set(lineage(ev, base.cls)):
            continue
        given: tuple[Value, ...] = ()
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            with ev.typed(own):
                given = tuple(ev.annotation(part, scope) for part in parts)
        return type_mapping(ev, base.cls, given, target, depth + 1)
    return own


def type_parameters(cls: Class) -> list[str]:
    """Return the names of the type variables of *cls*, in order."""
    modern = [str(getattr(parameter, "name", "")) for parameter in getattr(cls.node, "type_params", ())]
    if modern:
        return modern
    found: list[str] = []
    for node in cls.base_nodes:
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            names = [part.id for part in parts if isinstance(part, ast.Name)]
            if _last(node.value) in ("Generic", "Protocol"):
                return names
            found += [name for name in names if name not in found]
    return found


def primary_key(ev: Evaluator, cls: Class | None) -> str:
    """Return the name of the primary key of *cls*, or ``id``."""
    if cls is not None:
        for part in lineage(ev, cls):
            for name, bindings in part.bindings.items():
                value = bindings[-1].value
                if isinstance(value, ast.Call) and any(
                    keyword.arg == "primary_key" and isinstance(keyword.value, ast.Constant) and keyword.value.value
                    for keyword in value.keywords
                ):
                    return name
    return "id"


def unknown_mapped(name: str) -> Value:
    """Return an instance of a mapped class that cannot be found, known only by *name*."""
    return Value(Kind.INSTANCE, name=name, mapped=True, sure=False) if name else UNKNOWN


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
