"""Subscribers of signals: what the library says, told to logs and metrics."""
