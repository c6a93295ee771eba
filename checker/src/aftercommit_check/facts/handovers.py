"""Find the calls that hand work over: background tasks, asyncio tasks, threads, executors, schedulers."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from aftercommit_check.facts import classes, functions, library, typehints
from aftercommit_check.facts.values import UNKNOWN, Kind, Value

if TYPE_CHECKING:
    from aftercommit_check.facts.infer import Evaluator
    from aftercommit_check.index.scopes import Function, Scope


class Way(Enum):
    """How work is handed over; the value is what a message calls it."""

    BACKGROUND = "background task"
    TASK = "asyncio task"
    GROUP = "task group"
    THREAD = "thread"
    EXECUTOR = "executor"
    SCHEDULER = "scheduled job"


@dataclass(frozen=True, slots=True, eq=False)
class Argument:
    """One value that crosses, and the parameter of the task that gets it, if it is known."""

    node: ast.expr
    scope: Scope
    value: Value
    param: str


@dataclass(frozen=True, slots=True, eq=False)
class Handover:
    """One call that hands work over.

    Attributes:
        way: How.
        call: The call.
        scope: Where it stands.
        target: What will run.
        target_node: The expression of it.
        arguments: What crosses with it.
        sure: Whether it surely is such a call; by its name only, if not.

    """

    way: Way
    call: ast.Call
    scope: Scope
    target: Value
    target_node: ast.expr | None
    arguments: tuple[Argument, ...]
    sure: bool


BACKGROUND_NAMES = re.compile(r"(^|_)(background|bg)(_?tasks?|_?runner)?$|^tasks$|background_?tasks?", re.IGNORECASE)
LOOP_NAMES = re.compile(r"loop$", re.IGNORECASE)
GROUP_NAMES = re.compile(r"(^|_)(tg|task_?group|group|nursery)$", re.IGNORECASE)
EXECUTOR_NAMES = re.compile(r"(executor|pool|threads?)$", re.IGNORECASE)
SCHEDULER_NAMES = re.compile(r"sched", re.IGNORECASE)
TASK_CALLS = frozenset({"create_task", "ensure_future", "run_coroutine_threadsafe", "start_soon"})
TRIGGERS = frozenset(
    {*TASK_CALLS, "add_task", "BackgroundTask", "Thread", "Timer", "submit", "run_in_executor", "to_thread", "add_job",
     "map", "call_soon_threadsafe", "call_later", "start_new_thread", "run_in_threadpool"}
)  # fmt: skip


def find(ev: Evaluator, call: ast.Call, scope: Scope, wrappers: dict[str, str] | None = None) -> Handover | None:
    """Return what *call* hands over, or None if it does not."""
    name = typehints.last_name(call.func)
    if name in TRIGGERS:
        if name == "add_task":
            return _add_task(ev, call, scope)
        if name == "BackgroundTask":
            return _background_task(ev, call, scope)
        if name in TASK_CALLS:
            return _task(ev, call, scope, name)
        if name in ("Thread", "Timer"):
            return _thread(ev, call, scope)
        if name in ("submit", "map"):
            return _submit(ev, call, scope)
        if name in ("run_in_executor", "call_soon_threadsafe", "call_later"):
            return _run_in_executor(ev, call, scope, name)
        if name in {"to_thread", "run_in_threadpool"}:
            return _callable(ev, Way.THREAD, call, scope, 0, sure=True)
        if name == "start_new_thread":
            return _thread(ev, call, scope)
        if name == "add_job":
            return _add_job(ev, call, scope)
    if wrappers and name in wrappers:
        return _wrapped(ev, call, scope)
    return None


def _receiver(ev: Evaluator, call: ast.Call, scope: Scope) -> tuple[Value, str]:
    if isinstance(call.func, ast.Attribute):
        return ev.infer(call.func.value, scope), typehints.last_name(call.func.value) or _called(call.func.value)
    return UNKNOWN, ""


def _called(node: ast.expr) -> str:
    return typehints.last_name(node.func) if isinstance(node, ast.Call) else ""


def is_background_tasks(ev: Evaluator, value: Value) -> bool | None:
    """Return whether *value* is Starlette's ``BackgroundTasks``: None if it cannot be told."""
    if value.kind is Kind.OBJECT:
        return value.name in library.BACKGROUND_TASKS or value.name.rpartition(".")[2] == "BackgroundTasks"
    if value.kind is Kind.INSTANCE and value.cls is not None:
        return any(name in library.BACKGROUND_TASKS for name in classes.external_bases(ev, value.cls))
    if value.kind in (Kind.UNKNOWN, Kind.NONE, Kind.LIBRARY_METHOD, Kind.SCALAR, Kind.SEQUENCE, Kind.MAPPING):
        return None
    return False


def _add_task(ev: Evaluator, call: ast.Call, scope: Scope) -> Handover | None:
    receiver, shown = _receiver(ev, call, scope)
    known = is_background_tasks(ev, receiver)
    if known is False:
        return _wrapped(ev, call, scope)
    if known is None and not BACKGROUND_NAMES.search(shown):
        return None
    return _callable(ev, Way.BACKGROUND, call, scope, 0, sure=bool(known) or "background" in shown.lower())


def _background_task(ev: Evaluator, call: ast.Call, scope: Scope) -> Handover | None:
    value = ev.infer(call.func, scope)
    if value.kind is not Kind.EXTERNAL or library.root_of(value.name) not in ("fastapi", "starlette"):
        return None
    return _callable(ev, Way.BACKGROUND, call, scope, 0, sure=True)


def _task(ev: Evaluator, call: ast.Call, scope: Scope, name: str) -> Handover | None:
    receiver, shown = _receiver(ev, call, scope)
    func = ev.infer(call.func, scope)
    if func.kind in (Kind.METHOD, Kind.FUNCTION, Kind.CLASS):
        return _wrapped(ev, call, scope)
    if func.kind is Kind.EXTERNAL and library.root_of(func.name) in ("asyncio", "anyio", "trio"):
        way = Way.TASK
    elif receiver.kind is Kind.OBJECT and library.root_of(receiver.name) not in ("asyncio", "anyio", "trio"):
        return None
    elif (
        (receiver.kind is Kind.OBJECT and "TaskGroup" in receiver.name)
        or GROUP_NAMES.search(shown)
        or name == "start_soon"
    ):
        way = Way.GROUP
    elif LOOP_NAMES.search(shown) or shown.startswith(("get_event_loop", "get_running_loop")):
        way = Way.TASK
    else:
        return None
    if name == "start_soon":
        return _callable(ev, way, call, scope, 0, sure=True)
    return coroutine(ev, way, call, scope, calls_argument(call, 0, "coro"))


def calls_argument(call: ast.Call, index: int, name: str) -> ast.expr | None:
    """Return an argument by place or keyword."""
    if len(call.args) > index:
        return call.args[index]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _thread(ev: Evaluator, call: ast.Call, scope: Scope) -> Handover | None:
    value = ev.infer(call.func, scope)
    if value.kind is not Kind.EXTERNAL or library.root_of(value.name) not in (
        "threading",
        "_thread",
        "multiprocessing",
    ):
        return None
    timer = value.name.endswith(("Timer", "start_new_thread"))
    index = 0 if value.name.endswith("start_new_thread") else 1
    target = calls_argument(call, index if timer else 1, "function" if timer else "target")
    args = calls_argument(call, index + 1 if timer else 3, "args")
    kwargs = calls_argument(call, index + 2 if timer else 4, "kwargs")
    if target is None:
        return None
    found = _target(ev, target, scope)
    arguments = [*found[1], *_spread(ev, args, scope, found[0]), *_spread_mapping(ev, kwargs, scope)]
    return Handover(Way.THREAD, call, scope, found[0], target, tuple(arguments), True)


def _submit(ev: Evaluator, call: ast.Call, scope: Scope) -> Handover | None:
    receiver, shown = _receiver(ev, call, scope)
    external = receiver.kind is Kind.OBJECT and library.root_of(receiver.name) in ("concurrent", "multiprocessing")
    if not external and not (receiver.kind in (Kind.UNKNOWN, Kind.NONE) and EXECUTOR_NAMES.search(shown)):
        return None
    return _callable(ev, Way.EXECUTOR, call, scope, 0, sure=external)


def _run_in_executor(ev: Evaluator, call: ast.Call, scope: Scope, name: str) -> Handover | None:
    receiver, shown = _receiver(ev, call, scope)
    if not (LOOP_NAMES.search(shown) or shown.startswith("get_") or receiver.kind is Kind.OBJECT):
        return None
    return _callable(ev, Way.EXECUTOR, call, scope, 0 if name == "call_soon_threadsafe" else 1, sure=True)


def _add_job(ev: Evaluator, call: ast.Call, scope: Scope) -> Handover | None:
    receiver, shown = _receiver(ev, call, scope)
    if receiver.kind not in (Kind.OBJECT, Kind.UNKNOWN, Kind.NONE) or not SCHEDULER_NAMES.search(shown + receiver.name):
        return None
    target = calls_argument(call, 0, "func")
    if target is None:
        return None
    found = _target(ev, target, scope)
    args = next((keyword.value for keyword in call.keywords if keyword.arg == "args"), None)
    kwargs = next((keyword.value for keyword in call.keywords if keyword.arg == "kwargs"), None)
    arguments = [*found[1], *_spread(ev, args, scope, found[0]), *_spread_mapping(ev, kwargs, scope)]
    return Handover(Way.SCHEDULER, call, scope, found[0], target, tuple(arguments), True)


def _callable(ev: Evaluator, way: Way, call: ast.Call, scope: Scope, first: int, *, sure: bool) -> Handover | None:
    """Read ``something(function, *args, **kwargs)``."""
    target = call.args[first] if len(call.args) > first else None
    if target is None:
        target = next((keyword.value for keyword in call.keywords if keyword.arg in ("func", "function", "fn")), None)
    if target is None or isinstance(target, ast.Starred):
        return None
    value, given = _target(ev, target, scope)
    if isinstance(target, ast.Call) and value.kind is Kind.COROUTINE:
        inner = coroutine(ev, way, call, scope, target)
        if inner is not None:
            return inner
    arguments = [*given, *_arguments(ev, value, call, scope, first + 1)]
    return Handover(way, call, scope, value, target, tuple(arguments), sure)


def _target(ev: Evaluator, node: ast.expr, scope: Scope) -> tuple[Value, list[Argument]]:
    """Return what will run, with the arguments that ``functools.partial`` has already given it."""
    value = ev.infer(node, scope)
    given: list[Argument] = []
    for _ in range(4):
        if value.kind is not Kind.PARTIAL or value.receiver is None or value.call is None:
            break
        inner, where = value.call
        given += _arguments(ev, value.receiver, inner, where, 1)
        value = value.receiver
    return value, given


def coroutine(
    ev: Evaluator, way: Way, call: ast.Call, scope: Scope, node: ast.expr | None, depth: int = 0
) -> Handover | None:
    """Read ``create_task(function(…))``: the inner call's arguments cross."""
    inner = resolve_call(node, scope) if node is not None else None
    if inner is None or depth > 4:
        return None
    made, where = inner
    target = ev.infer(made.func, where)
    arguments = list(_arguments(ev, target, made, where, 0))
    extra: list[Argument] = []
    for argument in made.args:
        # wait_for(f(db), 5), supervise(f(db)): what the inner coroutine holds crosses too.
        if isinstance(argument, ast.Call) and (target.kind is not Kind.CLASS):
            nested = ev.infer(argument, where)
            if nested.kind is Kind.COROUTINE:
                found = coroutine(ev, way, call, where, argument, depth + 1)
                if found is not None:
                    if target.func is None:
                        return found
                    extra += found.arguments
    return Handover(way, call, scope, target, made.func, (*arguments, *extra), True)


def resolve_call(node: ast.expr, scope: Scope) -> tuple[ast.Call, Scope] | None:
    """Return the call that *node* is, or that the variable *node* was last given."""
    if isinstance(node, ast.Call):
        return node, scope
    if isinstance(node, ast.Name):
        current: Scope | None = scope
        while current is not None and current.kind != "module":
            bindings = [binding for binding in current.bindings.get(node.id, []) if isinstance(binding.value, ast.Call)]
            before = [binding for binding in bindings if binding.position <= (node.lineno, node.col_offset)]
            chosen = (before or bindings)[-1:] if bindings else []
            if chosen and isinstance(chosen[0].value, ast.Call) and chosen[0].kind == "assign":
                return chosen[0].value, current
            current = current.parent
    return None


def _arguments(ev: Evaluator, target: Value, call: ast.Call, scope: Scope, first: int) -> list[Argument]:
    names: dict[ast.expr, str] = {}
    if target.func is not None:
        names = {
            node: name
            for name, node, _ in functions.bind(target.func, call, scope, skip=target.kind is Kind.METHOD, first=first)
        }
    elif target.kind is Kind.CLASS and target.cls is not None:
        init = classes.find_method(ev, target.cls, "__init__")
        if init is not None:
            names = {node: name for name, node, _ in functions.bind(init, call, scope, skip=True, first=first)}
    found: list[Argument] = []
    for node in call.args[first:]:
        if isinstance(node, ast.Starred):
            found += _spread(ev, node.value, scope, target)
        else:
            found.append(Argument(node, scope, ev.infer(node, scope), names.get(node, "")))
    for keyword in call.keywords:
        if keyword.arg is None:
            found += _spread_mapping(ev, keyword.value, scope)
        elif not (first and keyword.arg in ("func", "function", "fn") and not call.args):
            found.append(Argument(keyword.value, scope, ev.infer(keyword.value, scope), keyword.arg))
    return found


def _spread(ev: Evaluator, node: ast.expr | None, scope: Scope, target: Value) -> list[Argument]:
    """Read ``args=(…)`` and ``*args``."""
    if node is None:
        return []
    if isinstance(node, ast.Name):
        made = _literal(node, scope)
        node = made if made is not None else node
    if isinstance(node, ast.Tuple | ast.List):
        params: list[str] = []
        if target.func is not None:
            params = [param.name for param in target.func.params if not param.kind]
            if target.kind is Kind.METHOD and target.func.owner is not None:
                params = params[1:]
        found = []
        for index, part in enumerate(node.elts):
            found.append(Argument(part, scope, ev.infer(part, scope), params[index] if index < len(params) else ""))
        return found
    value = ev.infer(node, scope)
    if value.kind is Kind.TUPLE:
        return [Argument(node, scope, part, "") for part in value.args]
    return [Argument(node, scope, value, "")]


def _spread_mapping(ev: Evaluator, node: ast.expr | None, scope: Scope) -> list[Argument]:
    """Read ``kwargs={…}`` and ``**kwargs``."""
    if node is None:
        return []
    if isinstance(node, ast.Name):
        made = _literal(node, scope)
        node = made if made is not None else node
    if isinstance(node, ast.Dict):
        return [
            Argument(value, scope, ev.infer(value, scope), str(key.value) if isinstance(key, ast.Constant) else "")
            for key, value in zip(node.keys, node.values, strict=True)
        ]
    if isinstance(node, ast.Call) and typehints.last_name(node.func) == "dict":
        return [Argument(word.value, scope, ev.infer(word.value, scope), word.arg or "") for word in node.keywords]
    return [Argument(node, scope, ev.infer(node, scope), "")]


def _literal(node: ast.Name, scope: Scope) -> ast.expr | None:
    """Return the literal collection that a variable was given."""
    current: Scope | None = scope
    while current is not None and current.kind != "module":
        bindings = current.bindings.get(node.id)
        if bindings:
            value = bindings[-1].value
            literal = isinstance(value, ast.Tuple | ast.List | ast.Dict) or (
                isinstance(value, ast.Call) and typehints.last_name(value.func) == "dict"
            )
            return value if literal and bindings[-1].kind == "assign" else None
        current = current.parent
    return None


def _wrapped(ev: Evaluator, call: ast.Call, scope: Scope) -> Handover | None:
    """Read a call of the project's own wrapper around one of the calls above."""
    func = ev.infer(call.func, scope)
    if func.func is None:
        return None
    shape = forwards(ev, func.func)
    if shape is None:
        way = started_by_decorator(ev, func.func)
        if way is None:
            return None
        return Handover(way, call, scope, func, call.func, tuple(_arguments(ev, func, call, scope, 0)), True)
    way, target_param, spreads = shape
    bound = {name: node for name, node, _ in functions.bind(func.func, call, scope, skip=func.kind is Kind.METHOD)}
    target = bound.get(target_param)
    if target is None:
        return None
    value, given = _target(ev, target, scope)
    if value.kind is Kind.COROUTINE:
        return coroutine(ev, way, call, scope, target)
    if not spreads:
        return Handover(way, call, scope, value, target, tuple(given), True)
    rest = [node for node in call.args if node not in bound.values() and not isinstance(node, ast.Starred)]
    named = [word for word in call.keywords if word.arg is not None and word.arg not in bound]
    names: list[str] = []
    if value.func is not None:
        names = [param.name for param in value.func.params if not param.kind]
        names = names[1:] if value.kind is Kind.METHOD and value.func.owner is not None else names
    arguments = [
        *given,
        *(
            Argument(node, scope, ev.infer(node, scope), names[index] if index < len(names) else "")
            for index, node in enumerate(rest)
        ),
        *(Argument(word.value, scope, ev.infer(word.value, scope), word.arg or "") for word in named),
    ]
    return Handover(way, call, scope, value, target, tuple(arguments), True)


def forwards(ev: Evaluator, func: Function, depth: int = 0) -> tuple[Way, str, bool] | None:
    """Return how *func* hands one of its parameters over, if it does.

    Returns:
        The way, the parameter that is run, whether ``*args`` or ``**kwargs`` go with it.

    """
    key: tuple[object, ...] = ("forwards", func)
    if key in ev.function_facts:
        known = ev.function_facts[key]
        return known if isinstance(known, tuple) else None
    ev.function_facts[key] = None
    found: tuple[Way, str, bool] | None = None
    names = {param.name for param in func.params if not param.kind}
    for call, scope in func.body.calls:
        if typehints.last_name(call.func) not in TRIGGERS or depth > 2:
            continue
        handover = find(ev, call, scope)
        if handover is None:
            continue
        target = handover.target_node
        if isinstance(target, ast.Name) and target.id in names:
            spreads = any(isinstance(node, ast.Starred) for node in call.args) or any(
                word.arg is None for word in call.keywords
            )
            found = (handover.way, target.id, spreads)
            break
    if found is None:
        for call, scope in func.body.calls:
            if typehints.last_name(call.func) in TASK_CALLS and call.args and isinstance(call.args[0], ast.Name):
                param = func.param(call.args[0].id)
                if param is not None and ev.infer(call.func, scope).kind is Kind.EXTERNAL:
                    found = (Way.TASK, param.name, False)
    ev.function_facts[key] = found
    return found


def started_by_decorator(ev: Evaluator, func: Function) -> Way | None:
    """Return how a decorator of *func* turns calling it into handing it over, if one does."""
    for decorator in func.decorators:
        node = decorator.func if isinstance(decorator, ast.Call) else decorator
        value = ev.infer(node, func.parent or func)
        if value.kind is not Kind.FUNCTION or value.func is None:
            continue
        layers = [value.func, *value.func.body.nested]
        runs = {layer.params[0].name for layer in layers if layer.params}
        for layer in [inner for outer in layers for inner in outer.body.nested]:
            for call, _ in layer.body.calls:
                name = typehints.last_name(call.func)
                if name not in TRIGGERS:
                    continue
                for given in [
                    *call.args[:2],
                    *(word.value for word in call.keywords if word.arg in ("target", "func")),
                ]:
                    bare = given.func if isinstance(given, ast.Call) else given
                    if isinstance(bare, ast.Name) and bare.id in runs and bare.id not in {p.name for p in layer.params}:
                        return _WAYS.get(name, Way.THREAD)
    return None


_WAYS = {"add_task": Way.BACKGROUND, "BackgroundTask": Way.BACKGROUND} | dict.fromkeys(TASK_CALLS, Way.TASK)
