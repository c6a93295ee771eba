"""How many durable tasks a process gets through, beside what is written by hand and beside other queues.

The work is the same for everybody: load one row by its key in a session of the task's own, change it, commit. By hand
that is a loop over keys, a session each, with no record kept of anything. With aftercommit and the other queues it is
a task for each key.

- *backlog*: the tasks are queued first; then a worker starts, and the clock runs until the last row is changed.
- *sustained*: one process asks and runs. A transaction inserts rows and asks for a task for each; the clock runs from
  the first of these transactions until the last row is changed.
- *start*: how long after the commit that asked for it a task begins, asked for one at a time and at a steady rate.

Every measurement is a process of its own on a database of its own. They take turns, round by round, and what is told is
the median of the ratios within a round, because on a shared machine the figures themselves say little. At the end of
each, every row must have been changed exactly once.
"""
