"""Models from files and scripts, measured unrounded and under formats."""
