"""Telling what the backend does to a model: `fpsim.explain`, `fpsim.audit` and `fpsim.profile`."""
