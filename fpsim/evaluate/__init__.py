"""Models from checkpoints and scripts, measured unrounded and under formats."""
