"""Training with Detectron2's trainer: engine, hooks, writers, several processes."""
