"""What a launcher told this process."""

import os


def this_rank() -> int:
    """Which of a launcher's processes this is, as it says; 0 without one."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0
