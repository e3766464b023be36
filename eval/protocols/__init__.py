"""Every choice behind a number, frozen and named; those that come along are in `packaged`."""
