"""Files that are whole or absent: checkpoints, replicated or in parts.

`atomic` writes, `shard_files` reads and writes a group in parts, `checkpoint` is both together. Imports distributed,
settings. Start with `checkpoint`.
"""
