"""What ZeRO is: the arithmetic of its partitions, the names of its files, its configuration, its memory."""
