"""Background work for FastAPI and SQLAlchemy that starts after the commit."""
