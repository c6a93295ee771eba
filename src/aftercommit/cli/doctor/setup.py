"""What can be looked at before anything is connected to: packages, drivers, the SQLite file."""

from __future__ import annotations

import importlib.metadata
import os
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aftercommit.cli.doctor.findings import Finding, Level, word
from aftercommit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import URL

    from aftercommit.pools.urls import Flavour, Flavours
    from aftercommit.tasks import Task

__all__ = [
    "check_drivers",
    "check_environment",
    "check_file",
    "check_packages",
    "file_of",
    "installed",
    "network_file_system",
]

_REQUIREMENT: Final = re.compile(r"([\w.-]+)(?:\[[\w,]*\])?>=([\d.]+)")
_NUMBERS: Final = re.compile(r"\d+")
_OPTIONAL_AT_ALL: Final = ("typer", "rich")  # whoever reads this has them
_NETWORKED: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"}
)


def installed() -> dict[str, tuple[str | None, str]]:
    """Return, by package, the version that is here (or None) and the oldest that will do, as our own metadata say."""
    found: dict[str, tuple[str | None, str]] = {}
    try:
        required = importlib.metadata.requires("aftercommit") or []
    except importlib.metadata.PackageNotFoundError:
        return found
    for each in required:
        match = _REQUIREMENT.match(each)
        if match is not None and match[1] not in _OPTIONAL_AT_ALL:
            try:
                version: str | None = importlib.metadata.version(match[1])
            except importlib.metadata.PackageNotFoundError:
                version = None
            found[match[1].lower()] = (version, match[2])
    return found


def check_packages(packages: Mapping[str, tuple[str | None, str]]) -> list[Finding]:
    """Hold the versions of what is installed against the oldest that will do; what is absent may be absent."""
    findings = [
        Finding(
            check="packages",
            level=Level.WRONG,
            found=f"{name} {version} is installed, and {oldest} or later is needed",
            why="What this library leans on is missing there, or behaves in another way.",
            remedy=(f"pip install '{name}>={oldest}'",),
        )
        for name, (version, oldest) in packages.items()
        if version is not None and _older(version, oldest)
    ]
    if (packages.get("fastapi") or (None,))[0] == "0.121.0":
        findings.append(
            Finding(
                check="packages",
                level=Level.WARNING,
                found="fastapi 0.121.0 is installed",
                why="It forgets the scope of what stands in dependencies=[…]. install() mends that at start-up, but "
                "not for routes that are added later.",
                remedy=("pip install 'fastapi>=0.121.1'",),
            )
        )
    if findings:
        return findings
    here = ", ".join(f"{name} {version}" for name, (version, _) in sorted(packages.items()) if version is not None)
    python = ".".join(map(str, sys.version_info[:3]))
    return [Finding(check="packages", level=Level.OK, found=f"Python {python}, {here}")]


def check_drivers(flavours: Flavours, tasks: Iterable[Task[Any, Any]]) -> list[Finding]:
    """Find out whether the drivers are installed for what the URL serves and the tasks take."""
    takers: dict[Flavour, set[str]] = {"sync": set(), "async": set()}
    for task in tasks:
        if task.takes is not None:
            takers["async" if task.is_async else "sync"].add(task.name)
    missing: dict[Flavour, ConfigurationError] = {}
    for flavour in takers:
        try:
            flavours.url(flavour)
        except ConfigurationError as exc:
            missing[flavour] = exc
    findings: dict[str, Finding] = {}
    for flavour, error in missing.items():
        url = flavours.sync if flavour == "sync" else flavours.asynchronous
        # A driver that serves both is missing twice, and is said once; both flavours' tasks need it.
        names = {name for each, other in missing.items() if str(other) == str(error) for name in takers[each]}
        if url is None and not names:
            continue  # the URL was chosen for the other one
        if names:
            why = f"Tasks need it: {', '.join(sorted(names))}."
        elif len(missing) == len(takers):
            why = "Nothing can be connected to without it."
        else:
            why = "Nothing here has asked for it so far."
        findings[str(error)] = Finding(
            check="drivers",
            level=Level.WRONG if names or len(missing) == len(takers) else Level.NOTE,
            found=_without_code(error),
            why=why,
            remedy=tuple(re.findall(r"pip install '[^']+'", str(error))),
        )
    return list(findings.values()) or [
        Finding(check="drivers", level=Level.OK, found="The drivers for the URL are installed")
    ]


def check_environment() -> list[Finding]:
    """Say what the environment overrides."""
    told = os.environ.get("AFTERCOMMIT_RUNS", "").strip()
    if not told:
        return []
    return [
        Finding(
            check="environment",
            level=Level.NOTE,
            found=f"AFTERCOMMIT_RUNS={told} is set here",
            why="A process that is started from here runs only the tasks of these pools, whatever runs= says.",
            remedy=("unset AFTERCOMMIT_RUNS",),
        )
    ]


def file_of(url: URL) -> Path:
    """Return the file that an SQLite URL names."""
    return Path((url.database or "").removeprefix("file:").partition("?")[0])


def check_file(path: Path, where: str) -> list[Finding]:
    """Look at an SQLite file and its folder: whether they are there, may be written, and are on this machine.

    Args:
        path: The file.
        where: The ``Database``, as ``module:name``.
    """
    path = path.absolute()
    folder = path.parent
    if not folder.is_dir():
        return [
            _file_is_wrong(
                f"The folder {folder} does not exist", "No file can be made in it.", f"mkdir -p {word(folder)}"
            )
        ]
    if not os.access(folder, os.W_OK | os.X_OK):
        why = "SQLite keeps its log and its lock beside the file, so without writing there nothing can be committed."
        return [_file_is_wrong(f"The folder {folder} is not writable for {_user()}", why, _permit(folder))]
    findings = []
    if not path.exists():
        return [
            Finding(
                check="file",
                level=Level.NOTE,
                found=f"The file {path} is not there yet",
                why="It is made at start-up. If you expected one: a relative path begins in the folder in which the "
                "process is started.",
                remedy=(f"aftercommit schema {where} --apply",),
            )
        ]
    if not os.access(path, os.R_OK | os.W_OK):
        why = "Nothing can be committed."
        findings.append(_file_is_wrong(f"The file {path} is not writable for {_user()}", why, _permit(path)))
    kind = network_file_system(folder, _mounts())
    if kind is not None:
        why = (
            "Its locks do not reach other machines, and two of them would destroy it. Use a local disk, or PostgreSQL."
        )
        findings.append(_file_is_wrong(f"The file {path} is on a network file system ({kind})", why))
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    return [*(findings or [Finding(check="file", level=Level.OK, found=f"{path}, {size}")]), *_check_mode(path)]


def _check_mode(path: Path) -> list[Finding]:
    """Name the files of a database that every user of this machine may read: by their own bits, and their folders'."""
    beside = [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))]
    open_to_all = [each for each in beside if each.exists() and each.stat().st_mode & stat.S_IROTH]
    if os.name != "posix" or not open_to_all:
        return []
    private = [each for each in path.resolve().parents if not each.stat().st_mode & stat.S_IXOTH]
    files = ", ".join(f"{each} ({stat.S_IMODE(each.stat().st_mode):04o})" for each in open_to_all)
    kept_out = f", but for its folder {private[0]}, which keeps them out" if private else ""
    return [
        Finding(
            check="file mode",
            level=Level.NOTE if private else Level.WARNING,
            found=f"Every user of this machine may read {files}{kept_out}",
            why="The records hold the arguments and results of tasks, and the rows are yours. SQLite gives its other "
            "files the mode of the first; umask 077 makes new ones private.",
            remedy=(f"chmod o= {' '.join(word(each) for each in open_to_all)}",),
        )
    ]


def network_file_system(folder: Path, mounts: str) -> str | None:
    """Return the kind of network file system that *folder* is on, or None.

    Args:
        folder: Absolute.
        mounts: As ``/proc/mounts`` has them: device, place, kind, and more, a line each.
    """
    best, kind = Path("/"), ""
    for line in mounts.splitlines():
        words = line.split()
        if len(words) > 2:  # noqa: PLR2004  # device, place, kind
            place = Path(words[1].replace("\\040", " "))
            if folder.is_relative_to(place) and place.is_relative_to(best):
                best, kind = place, words[2]
    return kind if kind in _NETWORKED else None


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def _file_is_wrong(found: str, why: str, *remedy: str) -> Finding:
    return Finding(check="file", level=Level.WRONG, found=found, why=why, remedy=remedy)


def _permit(path: Path) -> str:
    is_ours = path.stat().st_uid == os.getuid()
    return f"chmod u+w {word(path)}" if is_ours else f"chown {_user()} {word(path)}"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        return str(os.getuid())


def _older(version: str, oldest: str) -> bool:
    return [int(each) for each in _NUMBERS.findall(version)[:3]] < [int(each) for each in oldest.split(".")]


def _without_code(error: ConfigurationError) -> str:
    return str(error).removesuffix(f" [{error.code}]")
