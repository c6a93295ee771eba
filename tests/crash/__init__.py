"""Real processes, killed and frozen at every point where it could matter."""
