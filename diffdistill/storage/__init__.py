"""Files that are whole or absent: checkpoints, replicated or sharded.

`atomic` writes, `shard_files` reads and writes a sharded group, `checkpoint` is both together. Imports distributed,
settings. Start with `checkpoint`.
"""
