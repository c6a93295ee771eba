"""Modules of the project, found by name and parsed on demand."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import warnings
from collections import OrderedDict
from functools import cached_property

from aftercommit_check.index.newer import rewritten
from aftercommit_check.index.scopes import Scope
from aftercommit_check.sources.files import UnreadableSourceError, decode, read_bytes

MAX_LINES_IN_MEMORY = 60_000
"""Syntax trees take some 1.5 kB a line; the least recently used are forgotten beyond this."""

PYTHON_2 = re.compile(r"^\s*(print\s+[\"'\w%]|except\s+[\w.]+\s*,\s*\w+\s*:|exec\s+[\"'])", re.MULTILINE)


CLASS_STATEMENT = re.compile(rb"^[ \t]*class[ \t]+(\w+)[ \t]*\(([^)]*)\)", re.MULTILINE)
EVERY_CLASS = "*"
"""Among the things consulted: the class statements of all files."""


class Module:
    """One parsed file.

    Attributes:
        path: Absolute path.
        shown: The path as findings show it.
        inside: The path inside the checked tree: what lies above it says nothing about the file.
        text: The source.
        tree: The syntax tree.
        nested: The scopes in it, by the node that opens them.

    """

    def __init__(self, path: str, shown: str, inside: str, text: str, tree: ast.Module) -> None:
        self.path = path
        self.shown = shown
        self.inside = inside.replace(os.sep, "/")
        self.text = text
        self.tree = tree
        self.nested: dict[ast.AST, Scope] = {}
        self.scope = Scope(tree, self, None, "<module>")

    @cached_property
    def lines(self) -> list[str]:
        """Return the source, line by line."""
        return self.text.split("\n")

    def take_apart(self) -> None:
        """Break the circles between scopes, so that the syntax tree is freed at once. The module is useless then."""
        for scope in [*self.nested.values(), self.scope]:
            scope.__dict__.clear()
        self.__dict__.clear()

    @property
    def is_package(self) -> bool:
        """Return whether it is an ``__init__`` file."""
        return os.path.basename(self.path).startswith("__init__.")

    @cached_property
    def is_test(self) -> bool:
        """Return whether it is part of a test suite, by its name."""
        return is_test_path(self.inside)


def is_test_path(path: str) -> bool:
    """Return whether the file at *path*, relative to the checked tree, is part of a test suite."""
    *folders, name = path.replace(os.sep, "/").split("/")
    if name.startswith("test_") or name.endswith("_test.py") or name == "conftest.py":
        return True
    return any(folder in {"tests", "test", "testing"} for folder in folders)


def parse(text: str) -> ast.Module:
    """Parse *text*.

    Raises:
        UnreadableSourceError: If it is not Python 3, or nested deeper than the parser goes.

    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except SyntaxError as error:
            problem = error
        except (ValueError, RecursionError, MemoryError) as error:
            raise UnreadableSourceError(f"cannot be parsed: {type(error).__name__}") from error
        changed = rewritten(text)
        try:
            if changed != text:
                return ast.parse(changed)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    kind = "Python 2" if PYTHON_2.search(text) else f"syntax error, line {problem.lineno}"
    raise UnreadableSourceError(f"{kind}: {problem.msg}") from problem


class Project:
    """The files that can be imported, seen from *root*.

    What it was asked is noted in :attr:`consulted`, which tells the cache what a result depends on.

    Args:
        root: The folder from which paths are looked up.
        files: All sources found, for look-ups by the end of a path where the import roots are unknown.
        base: The folder to which shown paths are relative.
        anchor: The checked tree; by default *root*.

    """

    def __init__(self, root: str, files: list[str], base: str, anchor: str | None = None) -> None:
        self.root = os.path.abspath(root)
        self.anchor = os.path.abspath(anchor or root)
        self.base = base
        self.consulted: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self._modules: OrderedDict[str, Module | None] = OrderedDict()
        self._lines = 0
        self._exists: dict[str, bool] = {}
        self._by_tail: dict[str, list[str]] = {}
        for file in files:
            path = os.path.abspath(file)
            self._exists[path] = True
            name = os.path.basename(path)
            tail = os.path.basename(os.path.dirname(path)) if name.startswith("__init__.") else name.rpartition(".")[0]
            self._by_tail.setdefault(tail, []).append(path)
        self._resolved: dict[tuple[str, str], str | None] = {}
        self._subclasses: dict[str, list[tuple[str, str]]] | None = None
        self.files = [os.path.abspath(file) for file in files]

    def load(self, path: str) -> Module | None:
        """Return the module at *path*, or None if it cannot be read as Python 3."""
        if path in self._modules:
            self._modules.move_to_end(path)
            return self._modules[path]
        module: Module | None = None
        try:
            data = read_bytes(path)
            self.consulted[path] = digest(data)
            text = decode(data)
            shown, inside = os.path.relpath(path, self.base), os.path.relpath(path, self.anchor)
            module = Module(path, shown, inside, text, parse(text))
            self._lines += text.count("\n") + 1
        except UnreadableSourceError as error:
            self.unreadable[path] = str(error)
        self._modules[path] = module
        return module

    def subclasses(self, name: str) -> list[tuple[str, str]]:
        """Return the files and names of classes that name *name* among their bases, by their class statements alone."""
        if self._subclasses is None:
            self._subclasses = {}
            for path in self.files:
                try:
                    data = read_bytes(path)
                except UnreadableSourceError:
                    continue
                for match in CLASS_STATEMENT.finditer(data):
                    child = match.group(1).decode("ascii", errors="replace")
                    for base in set(re.findall(rb"\w+", match.group(2))):
                        self._subclasses.setdefault(base.decode("ascii", errors="replace"), []).append((path, child))
        self.consulted[EVERY_CLASS] = ""
        return self._subclasses.get(name, [])

    def trim(self) -> None:
        """Forget the least recently used modules; called between files, when nobody holds their nodes.

        Scopes and modules refer to each other. They are taken apart by hand, because the collector, which would look
        at every node there is each time, cost more than the analysis.
        """
        if self._lines <= MAX_LINES_IN_MEMORY:
            return
        while self._lines > MAX_LINES_IN_MEMORY // 2 and self._modules:
            _, module = self._modules.popitem(last=False)
            if module is not None:
                self._lines -= module.text.count("\n") + 1
                module.take_apart()

    def resolve(self, name: str, importer: Module) -> str | None:
        """Return the file of the module called *name*, as *importer* would import it.

        Looked for beside the importer and in every folder above it (and their ``src``), nearest first: that finds
        ``src`` layouts and the several roots of a monorepo without being told about them.
        """
        key = (os.path.dirname(importer.path), name)
        if key not in self._resolved:
            self._resolved[key] = self._resolve(name, importer)
        return self._resolved[key]

    def resolve_relative(self, name: str, level: int, importer: Module) -> str | None:
        """Return the file that ``from <dots><name> import …`` names."""
        folder = os.path.dirname(importer.path)
        for _ in range(level - 1):
            folder = os.path.dirname(folder)
        return self._at(os.path.join(folder, *name.split("."))) if name else self._package(folder)

    def submodule(self, package: Module, name: str) -> str | None:
        """Return the file of the submodule *name* of *package*."""
        return self._at(os.path.join(os.path.dirname(package.path), name)) if package.is_package else None

    def _resolve(self, name: str, importer: Module) -> str | None:
        tail = name.replace(".", os.sep)
        folder = os.path.dirname(importer.path)
        while True:
            for candidate in (folder, os.path.join(folder, "src")):
                found = self._at(os.path.join(candidate, tail))
                if found is not None and found != importer.path:
                    return found
            parent = os.path.dirname(folder)
            if folder in (self.root, parent) or not folder.startswith(self.root):
                break
            folder = parent
        return self._by_path_end(tail, name)

    def _by_path_end(self, tail: str, name: str) -> str | None:
        """Find a module of at least two parts by the end of its path, if only one file fits."""
        if "." not in name:
            return None
        ends = (f"{os.sep}{tail}.py", f"{os.sep}{tail}{os.sep}__init__.py")
        found = [path for path in self._by_tail.get(name.rpartition(".")[2], ()) if path.endswith(ends)]
        return found[0] if len(found) == 1 else None

    def _at(self, stem: str) -> str | None:
        package = self._package(stem)
        if package is not None:
            return package
        return next((stem + end for end in (".py", ".pyi") if self._is_file(stem + end)), None)

    def _package(self, folder: str) -> str | None:
        path = os.path.join(folder, "__init__.py")
        return path if self._is_file(path) else None

    def _is_file(self, path: str) -> bool:
        known = self._exists.get(path)
        if known is None:
            known = os.path.isfile(path)
            self._exists[path] = known
        return known


def digest(data: bytes) -> str:
    """Return the short hash by which contents are compared."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
