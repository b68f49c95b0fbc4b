"""The command line ``fpsim``: one file per command."""
