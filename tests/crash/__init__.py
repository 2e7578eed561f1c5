"""Kills and failing system calls at every place where a run changes the disk: see ``make crash`` and
docs/reliability.md.
"""
