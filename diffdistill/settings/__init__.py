"""What every wing stands on: settings, what users are shown, locks.

`schema` makes a class configurable, `values` reads YAML into it, `registry` finds classes by name, plug-ins included;
`faults` says what is wrong; `terminal` is the one door for what is printed. Imports no other wing. Start with
`schema`.
"""
