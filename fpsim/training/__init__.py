"""Simulated precision outside the model: optimizers, parameters, gradients, and parallel training."""
