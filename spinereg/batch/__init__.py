"""Many cases at once: what a batch of jobs came to, on one page."""
