"""What a batch costs and what it keeps flat, beside the loop that people write and one UPDATE by hand.

Every side does the same to the same table, 100 000 rows by default, in a process of its own, whose computing and peak
memory are measured with it. Rounds alternate (A B C A B C), and what is told is the median of the ratios within a
round: on a shared machine the figures themselves say little.
"""
