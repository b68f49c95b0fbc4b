"""Real architectures in tiny configurations, and a command that reports what fpsim does to each of them."""
