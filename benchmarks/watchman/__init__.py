"""What it costs that every connection's holder, line and last statement are known: a part of each session's life.

Two databases of one process work on the same row, one as it is, the other with the watch taken out. They take turns in
short stretches, and what is told is how much more CPU time the less disturbed stretches of the watched side take,
beside how long a session lives.
"""
