"""From a checkpoint to files: safetensors folders and adapters, and the proof that nothing was lost."""
