"""Older tables, brought forward under old and new workers."""
