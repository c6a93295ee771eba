"""Exactly once, at random and for minutes: workers are killed and frozen, connections terminated, and all is counted."""
