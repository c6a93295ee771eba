"""``python -m aftercommit``: the command, where its script is not on the path."""

from aftercommit.cli import main

main()
