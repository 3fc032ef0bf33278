"""How long a stop takes at most, from SIGTERM on: 30 s, for one process as for all of `pathswitch up`.

18 s  what was accepted may finish: requests, streams, the training step and its checkpoint
23 s  a process that has not ended ends at once; what is on disk and in the rows is whole at any time
30 s  what the processes of `up` stood on (Ray) has ended too
"""

DRAIN_SECONDS = 18
PROCESS_SECONDS = 23
ALL_SECONDS = 30
