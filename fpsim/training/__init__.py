"""The rest of a training step in simulated precision: optimizers, parameters, gradients, and several ranks."""
