"""What a finding teaches: what happens at run time, and the corrected line in the user's own names."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from aftercommit_check.facts import classes, library
from aftercommit_check.facts.handovers import Handover, Way
from aftercommit_check.facts.values import Kind, Value
from aftercommit_check.rules.crossing import CONNECTION, ROW, Crossing

if TYPE_CHECKING:
    from aftercommit_check.facts.infer import Evaluator
    from aftercommit_check.sources.pins import Pin


def runtime(pin: Pin, item: Crossing, task: str) -> str:
    """Return what happens at run time when *item* goes to the background task *task*."""
    said = f"FastAPI is pinned to {pin.shown} ({pin.source}): " if pin.minor is not None else ""
    if item.what == ROW:
        return said + _row_runtime(pin, item, task)
    if item.what == CONNECTION:
        early = (
            "the connection goes back to its pool before the task starts, and the next request writes on the same wire."
        )
        late = f"the connection stays checked out until `{task}` is done, so a few slow tasks empty the pool."
        return said + _by_version(pin, early, late)
    early = (
        f"`{task}` gets a session that is closed. SQLAlchemy revives it without a word: reads work, the write is lost, "
        "and the connection stays idle in transaction."
    )
    late = (
        f"the request's connection stays checked out until `{task}` is done, and if the dependency commits on exit, "
        "its rows are not yet visible to anybody else while the task runs."
    )
    return said + _by_version(pin, early, late)


def _row_runtime(pin: Pin, item: Crossing, task: str) -> str:
    name = item.value.name or "row"
    early = (
        f"the session of the {name} is closed before `{task}` starts: an expired column or a relationship raises "
        "DetachedInstanceError, and changes to it are never written."
    )
    late = (
        f"the {name} still belongs to the request's session, which `{task}` then uses behind its back: expired columns "
        "and relationships are loaded on the request's connection (MissingGreenlet on an AsyncSession), and changes are "
        "written only if the dependency still commits."
    )
    return _by_version(pin, early, late)


def _by_version(pin: Pin, early: str, late: str) -> str:
    order = pin.exits_before_tasks
    if order is True:
        return early[0].upper() + early[1:]
    if order is False:
        return late[0].upper() + late[1:]
    return f"On FastAPI 0.118 and later: {late} On 0.106 to 0.117: {early}"


def concurrent_runtime(item: Crossing, way: Way) -> str:
    """Return what happens when *item* is used by work that runs at the same time."""
    if item.what == ROW:
        return (
            f"The {way.value} reads the {item.value.name or 'row'} while or after its session is used and closed by the caller: "
            "expired attributes raise DetachedInstanceError or MissingGreenlet, and changes are lost or written by chance."
        )
    what = library.describe(item.value)
    return (
        f"A {what} holds one connection and one transaction. Used by two at once their statements interleave: swapped or lost "
        "results, IllegalStateChangeError, a commit in the middle of the other's work. SQLAlchemy notices it only while the "
        "first connection is fetched. When the caller is done it is closed under the other's feet, and silently revived."
    )


def plain(ev: Evaluator, handover: Handover, items: list[Crossing]) -> str:
    """Return the corrected call in plain SQLAlchemy, with where the task gets its session from."""
    lines = []
    changed = _without(ev, handover, items, keep_rows=False)
    if changed is not None:
        lines.append(changed)
    task = handover.target.func.name if handover.target.func is not None else "the task"
    opened = [item for item in items if item.what != ROW]
    if opened:
        item = opened[0]
        name = _session_name(item)
        lines.append(f"# and in {task}, a session of its own:  {_opening(item.value, name)}")
    rows = [item for item in items if item.what == ROW and item.value.cls is not None]
    if rows:
        row = rows[0]
        cls = row.value.name
        await_ = "await " if opened and opened[0].value.is_async else ""
        lines.append(
            f"# and in {task}, load it anew:  {await_}{_session_name(opened[0]) if opened else 'db'}.get({cls}, …)"
        )
    if handover.way is Way.BACKGROUND and changed is not None:
        lines.append("# after an explicit commit in the endpoint, so that the task finds the rows")
    return "\n".join(lines)


def with_aftercommit(handover: Handover, items: list[Crossing]) -> str:
    """Return the corrected call with aftercommit: rows cross by identity, the session is injected."""
    call = _rewritten(None, handover, items, keep_rows=True)
    if call is None:
        return ""
    return f"after_commit({', '.join(call)})"


def _session_name(item: Crossing) -> str:
    if item.param and item.how == "argument":
        return item.param
    return item.node.id if isinstance(item.node, ast.Name) else "db"


def _opening(value: Value, name: str) -> str:
    if value.kind is Kind.CONNECTION:
        return f"with pool.connection() as {name}: …"
    return f"{'async ' if value.is_async else ''}with SessionLocal() as {name}: …"


def _without(ev: Evaluator, handover: Handover, items: list[Crossing], *, keep_rows: bool) -> str | None:
    parts = _rewritten(ev, handover, items, keep_rows=keep_rows)
    if parts is None:
        return None
    func = ast.unparse(handover.call.func)
    if handover.way in (Way.TASK, Way.GROUP) and func.rpartition(".")[2] != "start_soon":
        return f"{func}({parts[0]}({', '.join(parts[1:])}))"
    if handover.way is Way.THREAD and func.endswith("Thread"):
        return f"{func}(target={parts[0]}, args=({', '.join(parts[1:])}{',' if len(parts) == 2 else ''}))"
    return f"{func}({', '.join(parts)})"


def _rewritten(ev: Evaluator | None, handover: Handover, items: list[Crossing], *, keep_rows: bool) -> list[str] | None:
    """Return the parts of the corrected call: the task, then what may cross."""
    if handover.target_node is None or any(item.how != "argument" for item in items):
        return None
    rows = {item.node: item for item in items if item.what == ROW}
    dropped = {item.node for item in items if item.what != ROW}
    if any(not isinstance(node, ast.Name | ast.Attribute) for node in rows):
        return None
    keywords = {word.value: word.arg for word in handover.call.keywords if word.arg}
    if isinstance(handover.call.args[0] if handover.call.args else None, ast.Call):
        inner = handover.call.args[0]
        assert isinstance(inner, ast.Call)
        keywords |= {word.value: word.arg for word in inner.keywords if word.arg}
    parts = [ast.unparse(handover.target_node)]
    for argument in handover.arguments:
        if argument.node in dropped:
            continue
        shown = ast.unparse(argument.node)
        name = keywords.get(argument.node)
        row = rows.get(argument.node)
        if row is not None and not keep_rows:
            if argument.value.kind is not Kind.INSTANCE:
                shown = f"[row.{_key(ev, row)} for row in {shown}]"
            else:
                shown = f"{shown}.{_key(ev, row)}"
                name = f"{name}_{_key(ev, row)}" if name else name
        parts.append(f"{name}={shown}" if name else shown)
    return parts


def _key(ev: Evaluator | None, row: Crossing) -> str:
    return classes.primary_key(ev, row.value.cls) if ev is not None else "id"
