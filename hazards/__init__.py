"""What people write today, and the same with aftercommit, measured over a real uvicorn on the versions installed.

Each module is one scenario or two: an application as people write it, the same application with aftercommit, and
what a client and the database see of both. ``make hazards`` runs them all and prints a table.
"""
