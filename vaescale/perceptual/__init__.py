"""Distances between images in the maps of a frozen network, as a term of the loss."""
