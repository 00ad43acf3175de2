"""The engine: plans, random streams, runs, checkpoints. Everything else is built on it."""
