"""A rank that says which cores it may use."""

import os

print(sorted(os.sched_getaffinity(0)))
