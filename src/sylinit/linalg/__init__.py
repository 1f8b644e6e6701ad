"""Linear algebra on tensors: the Sylvester equation, eigendecompositions, subspaces, cross-validation."""
