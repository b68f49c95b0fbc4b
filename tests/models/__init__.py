"""Real architectures in tiny configurations, and a command that reports how fpsim rounds each of them."""
