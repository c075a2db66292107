"""Imports what the engine imports, so that its files lie in memory when it starts. No GPU, no network, no model."""

import os

os.nice(19)
for name in (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
):
    try:
        __import__(name)
    except BaseException:
        # Without a GPU some refuse; what they had read by then is read.
        pass
