"""How many requests the engine behind sglangd has at present: what a client's leaving is judged by."""
import json
import time
import urllib.request


def running(base, key):
    """Running and waiting in the engine, from sglangd's copy of /v1/loads (at most half a second old)."""
    request = urllib.request.Request(base + "/v1/loads", headers={"Authorization": "Bearer " + key})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        loads = json.load(answer)["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def reaches(base, key, wanted, seconds=15):
    """The engine's count once it is the wanted one, or what it was at the end of the time."""
    end = time.monotonic() + seconds
    while (now := running(base, key)) != wanted and time.monotonic() < end:
        time.sleep(0.1)
    return now
