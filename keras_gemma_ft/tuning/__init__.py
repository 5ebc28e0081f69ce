"""Loss, objectives, optimizer, trainer, callbacks and checkpoints."""
