"""Reports on the backend's work in a model: `fpsim.explain`, `fpsim.audit` and `fpsim.profile`."""
