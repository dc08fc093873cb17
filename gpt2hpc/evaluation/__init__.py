"""How good a model is, on data that everybody uses."""
