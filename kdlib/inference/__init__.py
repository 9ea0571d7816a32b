"""A trained student at work: its folder, the libraries that run it, and the mask of a new scan."""
