"""Find Chromium for the browser tests, and install it where that is allowed.

``python -m tests.support.chromium`` is the step of ``make test`` that brings it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = ("apt-get", "install", "--yes", "--no-install-recommends", "chromium")
MISSING = (
    "Chromium is missing, so the browser tests are LEFT OUT: nobody checks the demo's pages. "
    "Install it (Debian: apt-get install chromium; elsewhere: .venv/bin/playwright install chromium) and run again."
)


def find() -> str | None:
    """Return the path of a Chromium that can be started, or None."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    return _playwrights_own()


def is_ci(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this run may leave nothing out."""
    return environment.get("CI", "").lower() in {"1", "true"}


def may_install() -> bool:
    """Tell whether this is Debian and we are root: elsewhere the machine is not ours to change."""
    release = Path("/etc/os-release")
    is_debian = release.exists() and "ID=debian" in release.read_text().splitlines()
    return is_debian and os.geteuid() == 0 and shutil.which("apt-get") is not None


def install() -> None:
    """Install Debian's Chromium.

    Raises:
        subprocess.CalledProcessError: If apt-get fails; its output has been shown by then.
    """
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (("apt-get", "update"), INSTALL):
        print("$", *command, flush=True)
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        done.check_returncode()


def _playwrights_own() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def main() -> int:
    """Make sure that Chromium is there; say loudly what happens where it cannot be."""
    if find():
        return 0
    if may_install():
        try:
            install()
        except subprocess.CalledProcessError as error:
            print(error, file=sys.stderr)
    if find():
        return 0
    bar = "!" * 100
    print(f"\n{bar}\n{MISSING}\n{bar}\n", file=sys.stderr)
    return 1 if is_ci() else 0


if __name__ == "__main__":
    sys.exit(main())
