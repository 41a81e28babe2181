"""Searches for the best config: spaces, studies that many workers share, trials, results."""
