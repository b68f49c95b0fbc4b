"""What the server imports from which tests fork processes: each process is spared this, which takes 15 s.

It starts no thread: a process that is forked beside one may wait for a lock for ever.
"""

from __future__ import annotations

import torch
from torch import distributed as dist  # noqa: F401
from torch import nn
from torch._inductor.cpu_vec_isa import pick_vec_isa

import fpsim.compile_backend  # noqa: F401
from fpsim.paper import training  # noqa: F401

torch.set_num_threads(1)
pick_vec_isa()  # tries the compiler, and is remembered: processes with other caches need not try again
if not torch.cuda.is_available():  # else backward would start a thread for each GPU
    model = nn.Linear(2, 2)
    torch.compile(model, backend="fpsim_eager")(torch.ones(1, 2)).sum().backward()
    torch._dynamo.reset()
