"""How good a model is: scores of what generation and training produced."""
