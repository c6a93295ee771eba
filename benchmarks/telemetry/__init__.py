"""What logs, traces and metrics add to a task."""
