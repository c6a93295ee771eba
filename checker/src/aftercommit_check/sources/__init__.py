"""Everything read from disk: source files, configuration, pinned versions."""
