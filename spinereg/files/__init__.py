"""What lies on a disk: labels, images, pairs and transforms, read with suspicion and written whole."""
