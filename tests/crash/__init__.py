"""Kill a run, or let a system call fail, wherever it changes the disk. See ``make crash`` and docs/reliability.md."""
