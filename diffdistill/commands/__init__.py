"""The command line: `cli` lists the verbs, one file for each group of them; `exit_codes` says how a command ends.

Imports every wing, each when its verb runs. Start with `cli`."""
