"""Networks behind features: for each specification of eval/features.py a module with `load`."""
