"""Whether busy background tasks slow the requests: latency with the task pools idle, and with every place taken.

Two applications do the same. A request reads; a task runs a query of two seconds. ``by_hand`` is what people
write: ``BackgroundTasks``, a session of the task's own, one engine for all. The other is aftercommit, with a pool of
its own for the tasks. Both have as many connections in all.

A round starts a fresh uvicorn for each application in turn, measures requests with no task about, hands over many more
tasks than there are connections, and measures once more while they hold all that they can get. What is told are ratios
within a round: on a shared machine the figures themselves say little.
"""
