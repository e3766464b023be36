"""What a run says of itself: log, curves, trackers, health signals, previews, and the evaluation while it trains."""
