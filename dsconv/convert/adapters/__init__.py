"""PEFT adapters out of training checkpoints: which tensors PEFT saves for each method, and under which names."""
