"""Without a GPU, Triton's kernels run in its interpreter: the same indexing and arithmetic, in float32 and float16."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch may do
