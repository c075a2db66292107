#!/usr/bin/env python3
"""httpx with HTTP/2 over TLS: many streams on one connection, as one JSON object.

usage: http2_client.py BASE CERTIFICATE KEY MODEL
"""
import asyncio
import json
import ssl
import sys

import httpx

base, certificate, key, model = sys.argv[1:5]
trust = ssl.create_default_context(cafile=certificate)
CHAT = base + "/v1/chat/completions"
FIELDS = {"Authorization": "Bearer " + key}


def asked(tokens, content="Tell me about the sea."):
    return {"model": model, "stream": True, "max_tokens": tokens, "ignore_eos": True,
            "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": content}]}


def client():
    # One connection, or it is not told whether streams share one.
    one = httpx.Limits(max_connections=1)
    return httpx.AsyncClient(http2=True, verify=trust, headers=FIELDS, limits=one, timeout=60, trust_env=False)


async def streamed(http, tokens):
    async with http.stream("POST", CHAT, json=asked(tokens)) as answer:
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    events = [json.loads(line[6:]) for line in lines[:-1]]
    return {"version": answer.http_version, "status": answer.status_code, "last": lines[-1],
            "id": events[0]["id"], "one id": len({event["id"] for event in events}) == 1,
            "stream": answer.extensions["stream_id"],
            "tokens": sum(bool(event["choices"] and event["choices"][0]["delta"].get("content")) for event in events)}


async def running(http):
    loads = (await http.get(base + "/v1/loads")).json()["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


async def reaches(http, wanted):
    for _ in range(150):
        if (now := await running(http)) == wanted:
            break
        await asyncio.sleep(0.1)
    return now


async def left(http):
    """One stream is left in the middle; its neighbour on the same connection ends well.

    httpcore 1.0.9 tells nobody that it left a stream: no RST_STREAM, so the engine goes on until the connection ends.
    """
    neighbour = asyncio.create_task(streamed(http, 150))
    async with http.stream("POST", CHAT, json=asked(3000)) as left:
        async for line in left.aiter_lines():
            if "content" in line:
                break
        both = await reaches(http, 2)
    return {"both": both, "neighbour": await neighbour}


async def pieces(text):
    for at in range(0, len(text), 10_000):
        yield text[at:at + 10_000]


async def uploaded(http, size):
    """A body of no told length, in pieces: what of it arrived, by the engine's count of its prompt."""
    body = json.dumps({**asked(2, "x" * size), "stream": False}).encode()
    answer = await http.post(CHAT, content=pieces(body), headers={"Content-Type": "application/json"})
    return {"status": answer.status_code, "prompt": answer.json()["usage"]["prompt_tokens"]}


async def main():
    async with client() as http:
        together = await asyncio.gather(*(streamed(http, 30 + n) for n in range(8)))
        told = {"together": together, "uploaded": await uploaded(http, 1_000_000), "left": await left(http)}
        refused = await http.post(CHAT, json=asked(1), headers={"Authorization": "Bearer wrong"})
        told["refused"] = {"version": refused.http_version, "status": refused.status_code}
    async with client() as http:
        told["none"] = await reaches(http, 0)
    print(json.dumps(told))


asyncio.run(main())
