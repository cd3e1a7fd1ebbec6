"""The run directory: what is written, and how a run goes on from it."""
