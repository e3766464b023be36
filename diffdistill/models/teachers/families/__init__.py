"""One file a family, named as the family: putting one here makes it known."""
