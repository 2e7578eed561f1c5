"""What ZeRO is: how parameters are cut into partitions, and what the files of a checkpoint are called."""
