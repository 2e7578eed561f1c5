"""dsconv: sharded training checkpoints into safetensors, streaming, exact and safe."""
