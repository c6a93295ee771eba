"""``python -m aftercommit_check``."""

from aftercommit_check.cli import entry

if __name__ == "__main__":
    entry()
