"""``python -m dsconv.compat``: the command line of DeepSpeed's ``zero_to_torch.py``."""

from dsconv.compat import main

main()
