"""Training ternary models: recipe, text, straight-through estimator, loop, export."""
