"""Records side by side, and a run on one page: the leaderboard, reports, their HTML."""
