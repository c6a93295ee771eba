"""The state moves of a record against a reference model, and broken variants that the model must catch."""
