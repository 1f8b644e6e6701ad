"""Second moments of the rows of input that reach a layer."""
