"""What a run will need.

`counting` of bytes while code runs, `prediction` before it, `advice` on what to turn on, `oom_retry` when memory ends
all the same.
"""
