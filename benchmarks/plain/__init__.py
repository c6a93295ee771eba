"""What a session of the application's own costs, with aftercommit imported and without."""
