#!/usr/bin/env python3
"""The websockets library on /v1/realtime: JSON objects, one a line.

usage: realtime.py HOST:PORT KEY

Opens without a key, with a wrong one and with a good one in either header; talks; then stays until it is told to go.
"""
import base64
import json
import sys

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

place, key = sys.argv[1:3]
URI = f"ws://{place}/v1/realtime?model=small"


def say(**facts):
    print(json.dumps(facts), flush=True)


def opened(fields):
    return connect(URI, additional_headers=fields, proxy=None, max_size=None)


def refused(fields):
    try:
        with opened(fields):
            return 101
    except InvalidStatus as answer:
        return answer.response.status_code


def event(socket):
    return json.loads(socket.recv(timeout=30))


def transcribed(socket, audio):
    socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(audio).decode()}))
    socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
    heard, committed = "", event(socket)["type"]
    while (told := event(socket))["type"].endswith(".delta"):
        heard += told["delta"]
    return {"committed": committed, "heard": heard, "transcript": told.get("transcript")}


say(none=refused({}), wrong=refused({"Authorization": "Bearer wrong"}))
with opened({"x-api-key": key}) as socket:
    created = event(socket)["type"]
    # Three megabytes, more than any buffer on the way.
    told = transcribed(socket, bytes(3_000_000))
    pong = socket.ping().wait(timeout=30)
say(created=created, pong=pong, closed=socket.close_code, **told)
with opened({"Authorization": "Bearer " + key}) as socket:
    created = event(socket)["type"]
    say(open=created)
    try:
        event(socket)
        say(code=None)
    except ConnectionClosed as closed:
        say(code=closed.rcvd.code if closed.rcvd else None)
