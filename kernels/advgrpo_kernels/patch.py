"""Run a program of another codebase with the fused kernels in the place of its own functions, without an edit to it.

    python -m advgrpo_kernels.patch PEER -- SCRIPT.py ARG ...
    python -m advgrpo_kernels.patch PEER -- -m MODULE ARG ...
    torchrun --nproc_per_node 8 -m advgrpo_kernels.patch PEER -- SCRIPT.py ARG ...
    accelerate launch -m advgrpo_kernels.patch PEER -- SCRIPT.py ARG ...

The functions are replaced right after the module that defines them has been executed, or, if that is the script
itself, before its `if __name__ == "__main__":`. Each is first run beside its replacement; if they do not agree, the
program stops. So are the blocks of those diffusers transformers that the codebase trains, unless --no-blocks says
otherwise. The script finds sys.argv, sys.path, __name__ and __file__ as under plain python, except that torch has been
imported before it starts.
"""

import sys

from .integrations._launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
