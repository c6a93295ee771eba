"""Who holds which connection, since when, doing what; told when late, and refused where none could ever come back."""
