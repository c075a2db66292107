#!/usr/bin/env python3
"""A client that is there before the server: retries until it is answered, then streams one completion.

usage: patient.py BASE_URL MODEL SECONDS

Prints one JSON object: how often nobody listened, how often it was told 503 (and whether each such answer
was a JSON error with Retry-After), and the stream it got in the end. Exit 1 if the time was not enough.
"""
import asyncio
import json
import sys
import time

import aiohttp

base_url, model, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
seen = {"refused": 0, "unavailable": 0, "malformed_503": [], "other": []}
body = {
    "model": model,
    "messages": [{"role": "user", "content": "Are you there?"}],
    "temperature": 0, "max_tokens": 16,
    "stream": True,
}


async def attempt(session):
    """The stream's event count and whether it ended with [DONE], or None to try again."""
    async with session.post(base_url + "/chat/completions", json=body) as answer:
        if answer.status == 503:
            seen["unavailable"] += 1
            text = await answer.text()
            try:
                good = isinstance(json.loads(text)["error"]["message"], str)
            except (ValueError, KeyError, TypeError):
                good = False
            if not good or not answer.headers.get("Retry-After", "").isdigit():
                seen["malformed_503"].append([dict(answer.headers), text[:300]])
            return None
        if answer.status != 200:
            seen["other"].append([answer.status, (await answer.text())[:300]])
            return None
        events, done = 0, False
        async for line in answer.content:
            if line.startswith(b"data: "):
                events += 1
                done = line.strip() == b"data: [DONE]"
        return {"events": events, "done": done}


async def main():
    end = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=180)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while time.monotonic() < end:
            try:
                stream = await attempt(session)
            except aiohttp.ClientConnectorError:
                seen["refused"] += 1
                stream = None
            if stream is not None:
                print(json.dumps({**seen, "stream": stream}))
                return 0
            # Retry-After may say minutes for a long load; this client also wants to see the phases.
            await asyncio.sleep(0.5)
    print(json.dumps(seen))
    return 1


sys.exit(asyncio.run(main()))
