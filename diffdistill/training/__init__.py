"""A run: `plan` finds every fault and writes nothing, `assembly` makes it ready, `trainer` loops.

`iteration` is one step.

`resolve` goes from a config to the method's problem, `resume` from a folder to its checkpoint. Sub-packages: `memory`
(prediction, advice, retry after out of memory), `speed` (options and offloading), `reports` (log, curves, trackers,
health, previews, evaluation). Knows no method by name. Imports methods' wing and what is below. Start with `trainer`.
"""
