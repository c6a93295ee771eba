"""The command ``aftercommit``: a worker process, and what an operator does by hand."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command; without the extra, say what to install."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        sys.exit("The command needs two more packages: pip install 'aftercommit[cli]'")
    from aftercommit.cli.commands import app

    try:
        app()
    except Exception as exc:  # noqa: BLE001  # of ours or of the application's; Python would print it with its values
        from aftercommit.wording import told_fully

        sys.exit(told_fully(exc))
