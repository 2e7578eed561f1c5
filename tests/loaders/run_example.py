"""Run an example like ``python EXAMPLE ARG…``, without the op that DeepSpeed would first spend minutes compiling on a
CPU.
"""

import runpy
import sys

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
