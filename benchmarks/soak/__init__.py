"""An adversary: faults of every kind at random, for minutes, and books that must balance to the last line."""
