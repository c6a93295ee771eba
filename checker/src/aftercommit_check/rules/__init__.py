"""What is wrong, rule by rule. Each module has one function that yields the findings of a function's body."""
