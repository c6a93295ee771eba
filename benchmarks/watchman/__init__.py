"""What the watch costs a session: the library knows who holds each connection, since when, and from which line.

Two kinds of processes take turns on one database: in one the library is as it is, in the other what watches is taken
out. In one process, the two would take turns in the caches of the processor, too, and taking it out and putting it back
would cost more than it does.
"""
