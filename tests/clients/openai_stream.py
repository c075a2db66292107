#!/usr/bin/env python3
"""Streams one chat completion with the openai SDK and prints what came, as one JSON object.

usage: openai_stream.py BASE_URL MODEL MAX_TOKENS
"""
import json
import sys

import openai

base_url, model, max_tokens = sys.argv[1:4]
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Count to ten."}],
    temperature=0, max_tokens=int(max_tokens),
    stream=True,
    stream_options={"include_usage": True},
)
chunks, text, finish, usage = 0, "", None, None
for chunk in stream:
    chunks += 1
    if chunk.usage:
        usage = chunk.usage.completion_tokens
    for choice in chunk.choices:
        text += choice.delta.content or ""
        text += getattr(choice.delta, "reasoning_content", None) or ""
        finish = choice.finish_reason or finish
print(json.dumps({"chunks": chunks, "characters": len(text), "finish": finish, "completion_tokens": usage}))
