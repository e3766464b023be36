"""How much to guide, when, and with how few evaluations."""
