"""What a request with a session and one task costs, beside the same written by hand.

Three applications do the same work: a request inserts a job and hands over one task; the task, in a session of its
own, marks the job done. ``by_hand`` is what a careful author writes today: ``scope="function"``, ``BackgroundTasks``,
a session opened in the task. The other two are aftercommit, with ``durable=False`` and with durable tasks.

A round starts a fresh uvicorn in a process of its own, warms it up, and measures from the first request until the last
task has taken effect, as the database tells. Rounds alternate (A B C A B C), and what is told is the median of the
ratios within a round: on a shared machine the figures themselves say little.
"""
