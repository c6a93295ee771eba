"""Compare what resolution could be built on: read a tree and resolve the callee of every ``add_task`` with each.

    pip install libcst astroid jedi griffe
    python benchmarks/checker/bases.py TREE [--limit 150]

Each candidate gets the same files (those with an ``add_task``), one process, 120 seconds. "Resolved" counts the
functions handed to ``add_task`` whose definition it finds in the project.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from aftercommit_check.facts.infer import Evaluator
from aftercommit_check.index.modules import Project
from aftercommit_check.sources.files import find_sources

SECONDS = 120


def calls(tree: ast.AST) -> list[ast.expr]:
    """Return the function argument of every ``add_task``."""
    return [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_task"
        and node.args
    ]


def own_index(root: str, files: list[str]) -> tuple[int, int]:
    """Resolve with the standard ``ast`` and our own index."""
    project = Project(root, find_sources([root]), root)
    found = total = 0
    for path in files:
        module = project.load(path)
        if module is None:
            continue
        evaluator = Evaluator(project)
        for call, scope in [pair for func in functions(module.scope) for pair in func.body.calls]:
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_task" and call.args:
                total += 1
                found += evaluator.infer(call.args[0], scope).func is not None
    return found, total


def functions(scope):  # noqa: ANN001, ANN201 - a script
    """Return every function in a module."""
    from aftercommit_check.index.scopes import all_functions

    return [scope, *all_functions(scope)]


def with_astroid(root: str, files: list[str]) -> tuple[int, int]:
    """Resolve with astroid's inference."""
    import astroid
    from astroid import nodes

    sys.path.insert(0, root)
    manager = astroid.manager.AstroidManager()
    found = total = 0
    for path in files:
        module = manager.ast_from_file(path)
        for call in module.nodes_of_class(nodes.Call):
            if isinstance(call.func, nodes.Attribute) and call.func.attrname == "add_task" and call.args:
                total += 1
                try:
                    inferred = next(call.args[0].infer())
                except (astroid.exceptions.AstroidError, StopIteration, RecursionError):
                    continue
                found += isinstance(inferred, nodes.FunctionDef | astroid.bases.UnboundMethod)
    return found, total


def with_jedi(root: str, files: list[str]) -> tuple[int, int]:
    """Resolve with jedi's ``goto``."""
    import jedi

    project = jedi.Project(root)
    found = total = 0
    for path in files:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        script = jedi.Script(text, path=path, project=project)
        for node in calls(ast.parse(text)):
            total += 1
            names = script.goto(node.end_lineno, max(0, (node.end_col_offset or 1) - 1), follow_imports=True)
            found += any(name.type == "function" for name in names)
    return found, total


def with_libcst(root: str, files: list[str]) -> tuple[int, int]:
    """Parse and find qualified names with libcst; what they lead to in other files would still be ours to write."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, QualifiedNameProvider

    found = total = 0
    for path in files:
        wrapper = MetadataWrapper(cst.parse_module(Path(path).read_bytes()))
        names = wrapper.resolve(QualifiedNameProvider)
        for node in names:
            if (
                isinstance(node, cst.Call)
                and isinstance(node.func, cst.Attribute)
                and node.func.attr.value == "add_task"
                and node.args
            ):
                total += 1
                found += bool(names.get(node.args[0].value))
    return found, total


def with_griffe(root: str, files: list[str]) -> tuple[int, int]:
    """Load the packages with griffe, resolve by name; function bodies are not part of its model."""
    import griffe

    found = total = 0
    loader = griffe.GriffeLoader(search_paths=[root, str(Path(root) / "src")])
    for package in {Path(path).relative_to(root).parts[0] for path in files}:
        try:
            loader.load(package)
        except (ImportError, griffe.GriffeError, KeyError, SyntaxError, ValueError):
            continue
    for path in files:
        total += len(calls(ast.parse(Path(path).read_text(encoding="utf-8", errors="replace"))))
    return found, total


CANDIDATES: dict[str, Callable[[str, list[str]], tuple[int, int]]] = {
    "ast and an index of our own": own_index,
    "libcst": with_libcst,
    "astroid": with_astroid,
    "jedi": with_jedi,
    "griffe": with_griffe,
}


def one(name: str, root: str, files: list[str], queue: multiprocessing.Queue) -> None:
    """Run one candidate in a process of its own."""
    began = time.perf_counter()
    try:
        found, total = CANDIDATES[name](root, files)
        said = f"{found} of {total} resolved"
    except ImportError:
        said = "not installed"
    queue.put(
        (
            said,
            time.process_time(),
            time.perf_counter() - began,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
    )


def main() -> int:
    """Run every candidate and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tree", type=Path)
    parser.add_argument("--limit", type=int, default=150)
    options = parser.parse_args()
    root = str(options.tree.resolve())
    files = [path for path in find_sources([root]) if b".add_task(" in Path(path).read_bytes()][: options.limit]
    print(f"{len(files)} files with an add_task\n\n| base | callee found | seconds of CPU | MB |\n|---|---|---|---|")
    for name in CANDIDATES:
        queue: multiprocessing.Queue = multiprocessing.Queue()
        process = multiprocessing.Process(target=one, args=(name, root, files, queue))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            print(f"| {name} | not done in {SECONDS} s | – | – |", flush=True)
            continue
        said, cpu, _, memory = queue.get() if not queue.empty() else ("failed", 0.0, 0.0, 0.0)
        print(f"| {name} | {said} | {cpu:.1f} | {memory:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
