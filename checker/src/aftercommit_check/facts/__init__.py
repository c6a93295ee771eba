"""What an expression is, and what a function does with a session."""
