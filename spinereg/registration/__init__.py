"""From one pair of images to a map between them, and to all that is said about it."""
