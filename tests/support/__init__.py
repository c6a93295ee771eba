"""What the tests stand on: a real PostgreSQL, real servers, a real browser. Nothing here imports aftercommit."""
