"""Where things are: grids in the world, images and displacements on them, rigid motions."""
