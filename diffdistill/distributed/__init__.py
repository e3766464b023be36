"""The processes that train one run: which one this is, what they tell each other, sharded tensors, how a run stops.

Imports settings. Start with `processes`."""
