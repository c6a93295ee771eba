"""Exactly once, at random, for minutes: workers are killed and frozen, connections terminated, and all is counted."""
