"""Solvers of one layer's equation: one class a file, in the order of `sylinit.solvers.solve.SOLVERS`."""
