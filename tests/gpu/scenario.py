#!/usr/bin/env python3
"""sglangd before a real engine on real GPUs: what it adds, and what it leaves.

    scenario.py --sglangd BIN --config FILE --steps facts,start,load,leave,proxy,stop [--tp 8] [--out DIR]

Each step prints its figures as one JSON line (and adds it to OUT/figures.jsonl). A step that finds something
wrong says so under "wrong" and the script ends with 1. Standard library only; GPU memory is read through
libnvidia-ml itself, since nvidia-smi takes longer than what is measured here. Without that library (a machine
without GPUs, to try the script) memory counts as nothing.

Every loop is bounded, every address is on the loopback.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

MIB = 1 << 20
PUBLIC, ADMIN, RELAY = 18000, 18001, 18002


class Nvml:
    """Used memory of each GPU, in MiB."""

    class Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    def __init__(self):
        self.gpus = []
        try:
            self.lib = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        if self.lib.nvmlInit_v2() != 0:
            return
        count = ctypes.c_uint()
        self.lib.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self.lib.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            self.gpus.append(handle)

    def used(self):
        out = []
        for handle in self.gpus:
            memory = self.Memory()
            self.lib.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            out.append(memory.used // MIB)
        return out


NVML = Nvml()


def now():
    return time.monotonic()


def ms(since):
    return round((now() - since) * 1000, 1)


def processes():
    """pid, parent, state, start time and command line of everything."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
            line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        tail = stat[stat.rindex(")") + 2 :].split()
        found.append({"pid": int(entry), "ppid": int(tail[1]), "state": tail[0], "command": line})
    return found


def ours(world):
    """Every live process of this scenario but this script: the mark of the run is in its environment, or was
    until the process wrote its title over it, as the engine's ranks do."""
    mark = f"SCENARIO_RUN={world.mark}".encode()
    found = []
    for process in processes():
        if process["state"] == "Z" or process["pid"] == os.getpid():
            continue
        try:
            environ = Path(f"/proc/{process['pid']}/environ").read_bytes().split(b"\0")
        except OSError:
            environ = []
        if mark in environ or process["command"].startswith("sglang::"):
            found.append(process)
    return found


def named(world, part):
    return [p for p in ours(world) if part in p["command"]]


def until(what, within, look, every=0.005):
    """The first true answer of `look`, and when it came."""
    end = now() + within
    while now() < end:
        found = look()
        if found:
            return found
        time.sleep(every)
    raise TimeoutError(f"not within {within} s: {what}")


def ask(port, path, method="GET", body=None, headers=(), timeout=5.0):
    """One request on a connection of its own: status, headers as text, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        if payload:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
        sock.sendall(head.encode() + payload)
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        plain, rest_ = b"", rest
        while rest_:
            size, _, rest_ = rest_.partition(b"\r\n")
            n = int(size.split(b";")[0] or b"0", 16)
            if n == 0:
                break
            plain, rest_ = plain + rest_[:n], rest_[n + 2 :]
        rest = plain
    return int(head.split(b" ", 2)[1]), head.decode(errors="replace"), rest


class World:
    def __init__(self, args):
        self.args = args
        self.mark = str(os.getpid())
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.home = Path(args.home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.daemon = None
        self.log = None
        self.wrong = []
        self.baseline = NVML.used()
        self.deadline = now() + args.within

    def say(self, step, **figures):
        line = json.dumps({"step": step, **figures})
        print(line, flush=True)
        with open(self.out / "figures.jsonl", "a") as file:
            file.write(line + "\n")

    def complain(self, step, text):
        self.wrong.append(f"{step}: {text}")
        self.say(step, wrong=text)

    # --- the daemon ---------------------------------------------------------------------------------

    def argv(self, command, *more):
        sets = ["--set", f"engine.tp={self.args.tp}"]
        for item in self.args.set:
            sets += ["--set", item]
        return [self.args.sglangd, command, *[w for c in self.args.config for w in ("--config", c)], *sets, *more]

    def serve(self, *more):
        self.log = open(self.out / "sglangd.log", "ab")
        env = dict(os.environ, SCENARIO_RUN=self.mark, NO_COLOR="1")
        argv = self.argv("serve", "--listen", f"127.0.0.1:{PUBLIC}", "--admin", f"127.0.0.1:{ADMIN}",
                         "--runtime-dir", str(self.home / "run"), "--state-dir", str(self.home / "state"), *more)
        self.daemon = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
                                       start_new_session=True)
        return now()

    def status(self):
        try:
            return json.loads(ask(ADMIN, "/status")[2])
        except (OSError, ValueError, IndexError):
            return {}

    def state(self):
        return self.status().get("state")

    def ready(self, within=420, watch=None):
        def look():
            status = self.status()
            if watch:
                watch(status)
            if status.get("state") in ("gave_up", "unkillable"):
                raise RuntimeError(f"{status.get('state')}: {status.get('reason')}")
            return status if status.get("state") in ("ready", "busy") else None
        return until("ready", within, look, every=0.05)

    def engine_pid(self):
        return self.status().get("engine", {}).get("pid")

    def engine_door(self):
        """The engine's private port and key: for the comparison without sglangd."""
        argv = Path(f"/proc/{self.engine_pid()}/cmdline").read_bytes().decode().split("\0")
        port = int(argv[argv.index("--port") + 1])
        yaml = (self.home / "run" / "engine.yaml").read_text()
        found = re.search(r'^"?api-key"?: "?([^"\n]+)"?', yaml, re.M)
        return port, found.group(1) if found else None

    def all_gone(self, since, within=30):
        """Times until no process is left and until the GPUs' memory is back where it was, in ms."""
        times = {}
        end = now() + within
        while now() < end and len(times) < 2:
            if "no_process_ms" not in times and not ours(self):
                times["no_process_ms"] = ms(since)
            if "memory_free_ms" not in times and self.is_free():
                times["memory_free_ms"] = ms(since)
            time.sleep(0.002)
        times["processes_left"] = [p["command"][:80] for p in ours(self)]
        times["mib_above_baseline"] = [u - b for u, b in zip(NVML.used(), self.baseline)]
        return times

    def is_free(self):
        return all(used - before < 64 for used, before in zip(NVML.used(), self.baseline))

    def check_gone(self, step, times):
        if times["processes_left"] or any(m >= 64 for m in times["mib_above_baseline"]):
            self.complain(step, f"left behind: {times}")

    def stop(self):
        since = now()
        self.daemon.send_signal(signal.SIGTERM)
        times = self.all_gone(since)
        code = self.daemon.wait(30)
        return {"exit": code, **times}


# --- load -------------------------------------------------------------------------------------------


def one_stream(port, key, tokens, words, results, index):
    body = json.dumps({
        "model": "tiny", "stream": True, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "messages": [{"role": "user", "content": f"{index} " + "word " * words}],
    }).encode()
    auth = f"Authorization: Bearer {key}\r\n" if key else ""
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{auth}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n").encode()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun = now()
        sock.sendall(head + body)
        data, events, times, done = b"", 0, [], False
        while chunk := sock.recv(65536):
            at = now()
            n = chunk.count(b"data: {")
            if n:
                times += [at] * n
                events += n
            done = done or b"data: [DONE]" in data[-32:] + chunk
            data = (data + chunk)[-64:]
        gaps = [b - a for a, b in zip(times[1:], times[2:])]
        results.append((times[0] - begun if times else None, gaps, events, done, now()))


def load_worker(port, key, streams, tokens, words, queue, start):
    results, threads = [], []
    while now() < start:
        time.sleep(0.001)
    for index in streams:
        thread = threading.Thread(target=one_stream, args=(port, key, tokens, words, results, index))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(180)
    queue.put(results)


def run_load(port, key, streams, tokens, words=16):
    """Figures of so many streams at once."""
    queue = multiprocessing.Queue()
    workers = max(1, min((os.cpu_count() or 2) // 2, 8))
    start = now() + 0.3
    pool = [multiprocessing.Process(target=load_worker,
                                    args=(port, key, range(w, streams, workers), tokens, words, queue, start))
            for w in range(workers)]
    for process in pool:
        process.start()
    results = [r for _ in pool for r in queue.get(timeout=200)]
    for process in pool:
        process.join(10)
    ttft = sorted(r[0] for r in results if r[0] is not None)
    gaps = sorted(g for r in results for g in r[1])
    span = max(r[4] for r in results) - start
    pick = lambda values, q: round(values[min(len(values) - 1, int(len(values) * q))] * 1000, 3) if values else None
    return {
        "streams": len(results), "whole": sum(r[3] for r in results), "events": sum(r[2] for r in results),
        # Each is asked for exactly so many; an engine that is pressed puts several tokens into one event.
        "seconds": round(span, 3), "tokens_per_s": round(tokens * sum(r[3] for r in results) / span, 1),
        "ttft_p50_ms": pick(ttft, 0.5), "ttft_p99_ms": pick(ttft, 0.99),
        "gap_p50_ms": pick(gaps, 0.5), "gap_p99_ms": pick(gaps, 0.99),
        "gap_mean_ms": round(statistics.fmean(gaps) * 1000, 3) if gaps else None,
    }


class Streams:
    """Streams that go on in the background, for what happens under load."""

    def __init__(self, count, tokens=100_000, words=16):
        self.results, self.errors = [], []
        self.threads = [threading.Thread(target=self.run, args=(tokens, words, i), daemon=True) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, tokens, words, index):
        try:
            one_stream(PUBLIC, None, tokens, words, self.results, index)
        except OSError as error:
            self.errors.append(str(error))

    def over(self, within=30):
        for thread in self.threads:
            thread.join(within)
        return {"whole": sum(r[3] for r in self.results), "broken": sum(not r[3] for r in self.results),
                "refused": len(self.errors)}


def running(world):
    port, key = world.engine_door()
    headers = [("Authorization", f"Bearer {key}")] if key else []
    loads = json.loads(ask(port, "/v1/loads?include=core", headers=headers)[2])
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads["loads"])


def under_load(world):
    count = world.args.under
    # What a dead proxy left runs on for a while, and would pass for the new streams.
    until("nothing of before runs", 30, lambda: running(world) == 0, every=0.05)
    streams = Streams(count, world.args.long)
    until(f"{count} streams run", 60, lambda: running(world) >= min(count, world.args.batch), every=0.05)
    return streams


# --- steps ------------------------------------------------------------------------------------------


def step_facts(world):
    """1: GPU facts in plan and status; a stranger that holds memory blocks the launch, by name."""
    plan = subprocess.run(world.argv("plan"), capture_output=True, text=True, timeout=120)
    lines = [line.strip() for line in plan.stdout.splitlines() if re.search("gpu|driver", line, re.I)]
    world.say("facts", plan_exit=plan.returncode, plan_lines=lines, baseline_mib=world.baseline)
    if not NVML.gpus:
        return
    hold = ("import torch,sys,time\n"
            f"x=[torch.empty({world.args.stranger_gb}<<30,dtype=torch.uint8,device=f'cuda:{{i}}') "
            "for i in range(torch.cuda.device_count())]\nprint('held',flush=True)\nsys.stdin.read()\n")
    stranger = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stranger.stdout.readline()
    world.serve()
    def named_stranger():
        status = world.status()
        text = json.dumps(status)
        return status if str(stranger.pid) in text and not status.get("engine", {}).get("pid") else None
    try:
        status = until("the stranger is named and nothing launched", 60, named_stranger, every=0.1)
        world.say("facts", stranger_pid=stranger.pid, held_mib=NVML.used(), state=status["state"],
                  phase=status.get("phase"), reason=status.get("reason"), advice=status.get("advice"),
                  gpus=status.get("gpus"))
    except TimeoutError as error:
        world.complain("facts", f"{error}; status {json.dumps(world.status())[:1500]}")
    since = now()
    stranger.stdin.close()
    stranger.wait(30)
    until("a launch once the stranger is gone", 60, world.engine_pid, every=0.02)
    world.say("facts", launched_after_stranger_ms=ms(since))
    # The start goes on: `start` watches it.


def step_start(world, label="cold"):
    """2: phases, percentage and ETA against the truth."""
    begun = now() if world.daemon and world.daemon.poll() is None else world.serve()
    seen, back, best = [], 0, 0.0

    def watch(status):
        nonlocal back, best
        at = round(now() - begun, 1)
        percent = status.get("percent")
        if percent is not None:
            back += percent < best
            best = max(best, percent)
        word = (status.get("state"), re.sub(r"[\d/%. ]+$", "", status.get("phase") or ""))
        sample = {"at": at, "state": word[0], "phase": status.get("phase"), "percent": percent,
                  "eta": status.get("eta_seconds"),
                  "range": status.get("eta_range_seconds"), "slow": status.get("slow")}
        if not seen or seen[-1]["word"] != word or at - seen[-1]["at"] >= 10:
            seen.append({**sample, "word": word})

    status = world.ready(watch=watch)
    total = now() - begun
    errors = [abs(s["at"] + s["eta"] - total) / total for s in seen if s["eta"] is not None and s["at"] > 0.3 * total]
    for sample in seen:
        del sample["word"]
    world.say(f"start {label}", ready_s=round(total, 1), went_back=back, samples=seen,
              eta_worst_error=round(max(errors), 3) if errors else None,
              engine=status.get("engine"), gpus=status.get("gpus"), gpu_mib=NVML.used(),
              ranks=sorted(p["command"].split()[0] for p in named(world, "sglang::scheduler")))
    if back:
        world.complain(f"start {label}", "the percentage went back")


def step_warm(world):
    stopped = world.stop()
    world.check_gone("warm", stopped)
    world.say("stop idle", **stopped)
    step_start(world, "warm")


def step_probe(world):
    argv = [world.args.sglangd, "probe", "--runtime-dir", str(world.home / "run"), "--timeout", "60s"]
    out = subprocess.run([*argv, "--content", "Hello", "--once"], capture_output=True, text=True, timeout=120)
    world.say("probe", exit=out.returncode, said=(out.stdout + out.stderr)[-400:])


def step_load(world):
    """3: the same load against the engine, through sglangd, and through a relay that knows no HTTP."""
    compare(world, [("load", world.args.streams, world.args.tokens, world.args.rounds),
                    ("load alone", 1, 128, 5 * world.args.rounds)])


def heavy_model(world):
    """A model of the tiny one's kind whose weights the GPU has to work for; they are not written."""
    heavy, tiny = world.home / "heavy", Path(world.args.model)
    heavy.mkdir(exist_ok=True)
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (heavy / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    hidden = world.args.heavy_hidden
    config.update(hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=world.args.heavy_layers,
                  num_attention_heads=hidden // 128, num_key_value_heads=min(8, hidden // 128))
    for follows in ("layer_types", "head_dim"):
        config.pop(follows, None)
    (heavy / "config.json").write_text(json.dumps(config))
    return heavy


WRITE_WEIGHTS = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
model.save_pretrained(sys.argv[1], max_shard_size="4GB")
"""


def drop_caches(shards):
    """The page cache has nothing of the shards, and where root may say so nothing of anything."""
    os.sync()
    for shard in shards:
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "all"
    except OSError:
        return "the shards alone"


def step_cold(world):
    """From `serve` to ready with a cold page cache, with and without reading ahead, on a model that takes its time."""
    if world.daemon and world.daemon.poll() is None:
        world.check_gone("cold", world.stop())
    heavy = heavy_model(world)
    begun = now()
    env = dict(os.environ, PYTHONPATH="/tmp/engine")
    subprocess.run([sys.executable, "-c", WRITE_WEIGHTS, str(heavy)], env=env, check=True, timeout=300)
    shards = sorted(heavy.glob("*.safetensors"))
    size = sum(shard.stat().st_size for shard in shards)
    world.say("cold", shards=len(shards), gb=round(size / 1e9, 1), written_s=round(now() - begun, 1))
    for prefetch in ("auto", "never", "never", "auto"):
        dropped = drop_caches(shards)
        log = world.out / "sglangd.log"
        before = log.stat().st_size if log.exists() else 0
        since = world.serve("--set", f"model.path={heavy}", "--set", f"weights.prefetch={prefetch}")
        phases = {}

        def watch(status):
            word = re.sub(r"[\d/%. ]+$", "", status.get("phase") or status.get("state") or "")
            phases.setdefault(word, round(now() - since, 1))

        world.ready(watch=watch)
        ready = round(now() - since, 1)
        with open(log, "rb") as file:
            file.seek(before)
            said = file.read().decode(errors="replace")
        world.say("cold", prefetch=prefetch, dropped=dropped, ready_s=ready, phases_begin_s=phases,
                  loading_s=re.findall(r"Load weight end.*?elapsed=([\d.]+)", said),
                  ahead=[line[-160:] for line in said.splitlines() if "ahead" in line][-2:])
        world.check_gone("cold", world.stop())
    for shard in shards:
        shard.unlink()


def step_throughput(world):
    """3: tokens a second, on a model so large that the GPU and not the engine's Python bounds them: a tiny one's
    rounds differ by a quarter among themselves. Its weights are the engine's own random ones."""
    heavy, hidden = heavy_model(world), world.args.heavy_hidden
    if world.daemon and world.daemon.poll() is None:
        world.check_gone("throughput", world.stop())
    since = world.serve("--set", f"model.path={heavy}", "--set", "engine.flags.load-format=dummy")
    world.ready()
    world.say("throughput", ready_ms=ms(since), hidden=hidden, layers=world.args.heavy_layers)
    compare(world, [("throughput", world.args.streams, world.args.tokens, 2 * world.args.rounds)])
    world.check_gone("throughput", world.stop())


def compare(world, loads):
    port, key = world.engine_door()
    ways = {"direct": (port, key), "through": (PUBLIC, None)}
    relay = None
    if world.args.relay:
        relay = subprocess.Popen([world.args.relay, str(RELAY), str(port)],
                                 env=dict(os.environ, SCENARIO_RUN=world.mark))
        ways["relay"] = (RELAY, key)
    try:
        run_load(port, key, world.args.streams, 64)
        run_load(PUBLIC, None, world.args.streams, 64)
        for label, streams, tokens, rounds in loads:
            turns = {name: [] for name in ways}
            for turn in range(rounds):
                if turn > 1 and now() > world.deadline:
                    rounds = turn
                    break
                # Each begins a round as often as the others: whoever comes first finds another machine.
                names = list(ways)[turn % len(ways):] + list(ways)[: turn % len(ways)]
                for name in names:
                    turns[name].append(run_load(*ways[name], streams, tokens))
                if streams > 1:  # what was measured is not lost if the time is over
                    world.say(f"{label} round", first=names[0],
                              **{name: turns[name][-1]["tokens_per_s"] for name in names})
            figures = {}
            for what in ("ttft_p50_ms", "ttft_p99_ms", "gap_p50_ms", "gap_p99_ms", "gap_mean_ms", "tokens_per_s"):
                middle = {name: round(statistics.median(t[what] for t in taken), 3) for name, taken in turns.items()}
                figures[what] = {**middle, "added": round(middle["through"] - middle["direct"], 3)}
            rates = {name: [t["tokens_per_s"] for t in taken] for name, taken in turns.items()}
            ratios = [t["tokens_per_s"] / d["tokens_per_s"] for t, d in zip(turns["through"], turns["direct"])]
            whole = all(t["whole"] == t["streams"] for taken in turns.values() for t in taken)
            world.say(label, streams=streams, tokens=tokens, rounds=rounds, every_stream_whole=whole,
                      throughput_ratio=round(statistics.median(ratios), 4), of_rounds=[round(r, 4) for r in ratios],
                      rates=rates,
                      **figures)
            if not whole:
                world.complain(label, "a stream was not whole")
    finally:
        if relay:
            relay.kill()
            relay.wait()


def step_leave(world):
    """7: clients that leave, in mid-stream and in prefill: through sglangd, and of the engine alone."""
    ways = {"through": (PUBLIC, None), "direct": world.engine_door()}
    for label, tokens, words, wait in (("mid-stream", world.args.long, 16, True),
                                       ("prefill", 64, world.args.prompt, False)):
        figures = {}
        for turn in range(3):
            for way, (port, key) in ways.items():
                auth = f"Authorization: Bearer {key}\r\n" if key else ""
                requests = []
                for client in range(32):
                    # No two prompts begin alike: what the engine has cached needs no prefill.
                    body = json.dumps({"model": "tiny", "stream": True, "max_tokens": tokens, "temperature": 0,
                                       "ignore_eos": True, "messages": [{"role": "user", "content": f"{client} {turn} "
                                                                         f"{way} " + "word " * words}]}).encode()
                    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{auth}Content-Type: application/json\r\n"
                            f"Content-Length: {len(body)}\r\n\r\n").encode()
                    requests.append(head + body)
                figures.setdefault(way, []).append(leave(world, port, requests, wait))
        world.say("leave", when=label, running_before_and_zero_ms=figures)


def leave(world, port, requests, wait):
    """So many clients send a request and leave: the engine's running requests before it, and ms until there are
    none."""
    socks = []
    for request in requests:
        sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        sock.sendall(request)
        socks.append(sock)
    if wait:
        for sock in socks[: world.args.batch]:
            sock.recv(65536)
    else:
        until("requests are in the engine", 30, lambda: running(world) > 0, every=0.005)
    before = running(world)
    since = now()
    for sock in socks:
        sock.close()
    until("nothing runs any more", 60, lambda: running(world) == 0, every=0.005)
    return before, ms(since)


def step_proxy(world):
    """5a: SIGKILL of the proxy process under streams: the engine does not notice."""
    streams = under_load(world)
    pid, memory = world.engine_pid(), NVML.used()
    victim = world.status()["proxy"]["pid"]
    since = now()
    os.kill(victim, signal.SIGKILL)

    def served():
        try:
            return ask(PUBLIC, "/v1/models", timeout=2)[0] == 200
        except (OSError, IndexError):
            return False
    until("served again", 20, served, every=0.001)
    back = ms(since)
    over = streams.over()
    same = world.engine_pid() == pid
    world.say("proxy killed", served_again_ms=back, engine_pid_unchanged=same,
              gpu_mib=[memory, NVML.used()], streams=over, restarts=world.status()["engine"]["restarts"])
    if not same:
        world.complain("proxy killed", "the engine was restarted")


def died(world, step, since, pid, within=300):
    """Notice, memory and readiness after a death."""
    noticed = until("noticed", 60, lambda: world.state() not in ("ready", "busy", None), every=0.005) and ms(since)
    free = until("memory free", 60, lambda: (not NVML.gpus or world.is_free()) and not named(world, "scheduler_"
                 if world.args.tp > 1 else "sglang::scheduler") or None, every=0.005) and ms(since)
    status = until("another engine", within, lambda: (s := world.status()) and s.get("engine", {}).get("pid") not in
                   (None, pid) and s, every=0.01)
    launched = ms(since)
    reason = status.get("engine", {}).get("last_exit")
    world.ready()
    ready = ms(since)
    world.say(step, noticed_ms=noticed, memory_free_and_ranks_gone_ms=free, launched_again_ms=launched,
              ready_again_ms=ready, of_that_sglangd_ms=launched, last_exit=reason)


def ranks(world):
    return sorted(named(world, "sglang::scheduler"), key=lambda p: p["command"])


def step_kill(world):
    """4a: a scheduler dies under load."""
    streams = under_load(world)
    pid, victim = world.engine_pid(), ranks(world)[world.args.tp * 5 // 8]
    since = now()
    os.kill(victim["pid"], signal.SIGKILL)
    died(world, f"{victim['command'].split()[0]} killed", since, pid)
    world.say("kill", streams=streams.over())


def step_midstart(world):
    """4b: the engine's main process is killed in the middle of a start."""
    stopped = world.stop()
    world.check_gone("midstart", stopped)
    world.serve()
    until("ranks are there", 240, lambda: ranks(world), every=0.01)
    if NVML.gpus:
        until("memory is taken", 120, lambda: any(u - b > 1000 for u, b in zip(NVML.used(), world.baseline)), every=0.01)
    pid = world.engine_pid()
    since = now()
    os.kill(pid, signal.SIGKILL)
    died(world, "main killed in mid-start", since, pid)


def step_hang(world):
    """4c: a scheduler is stopped under load: suspected, named, acted upon."""
    streams = under_load(world)
    pid, victim = world.engine_pid(), ranks(world)[world.args.tp * 3 // 8]
    since = now()
    os.kill(victim["pid"], signal.SIGSTOP)
    suspected = until("suspected", 90, lambda: world.status().get("engine", {}).get("suspected_seconds") is not None
                      or world.state() not in ("ready", "busy"), every=0.02) and ms(since)
    named_as = world.status()
    acted = until("acted upon", 400, lambda: world.state() not in ("ready", "busy"), every=0.02) and ms(since)
    reason = until("a reason", 30, lambda: world.status().get("reason"), every=0.02)
    status = until("another engine", 400, lambda: (s := world.status()) and s.get("engine", {}).get("pid") not in
                   (None, pid) and s, every=0.02)
    launched = ms(since)
    world.ready()
    bundles = sorted(str(p.relative_to(world.home)) for p in (world.home / "state").rglob("*") if "bundle" in str(p))[:12]
    world.say(f"{victim['command'].split()[0]} stopped", suspected_ms=suspected, acted_ms=acted, reason=reason,
              launched_again_ms=launched, ready_again_ms=ms(since), said_meanwhile=named_as.get("engine", {}).get("suspicion"),
              last_exit=status.get("engine", {}).get("last_exit"), bundles=bundles, streams=streams.over())


def step_orphans(world):
    """5b: SIGKILL of the supervisor while it serves."""
    since = now()
    world.daemon.kill()
    world.daemon.wait()
    times = world.all_gone(since)
    world.check_gone("supervisor killed, serving", times)
    world.say("supervisor killed, serving", **times)


def step_importing(world):
    """5b, 6: SIGKILL of the supervisor, and SIGTERM to it, while the engine's children import."""
    for label, name in (("supervisor killed", signal.SIGKILL), ("stop", signal.SIGTERM)):
        world.serve()
        until("children import", 120, lambda: len(named(world, "multiprocessing.spawn")) >= world.args.tp
              and not named(world, "sglang::"), every=0.01)
        children = len(ours(world))
        since = now()
        world.daemon.send_signal(name)
        times = world.all_gone(since)
        world.daemon.wait(30)
        world.check_gone(f"{label}, importing", times)
        world.say(f"{label}, importing", processes_before=children, **times)


def step_stopload(world):
    """6: SIGTERM under load."""
    streams = under_load(world)
    stopped = world.stop()
    world.check_gone("stop under load", stopped)
    world.say("stop under load", **stopped, streams=streams.over())


def step_stop(world):
    stopped = world.stop()
    world.check_gone("stop", stopped)
    world.say("stop", **stopped)


STEPS = {name[5:]: step for name, step in globals().items() if name.startswith("step_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglangd", required=True)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", default="facts,start,probe,load,leave,proxy,stop", help="of " + ", ".join(STEPS))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--out", default="figures")
    parser.add_argument("--home", default="/tmp/sglangd-scenario")
    parser.add_argument("--streams", type=int, default=64, help="of the load")
    parser.add_argument("--relay", help="a TCP relay (PORT UPSTREAM_PORT) to compare with: bench/peers/tcp-pump")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of its streams")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=20000, help="tokens of a stream that is to last")
    parser.add_argument("--under", type=int, default=32, help="streams under which something is killed")
    parser.add_argument("--within", type=float, default=1e9, metavar="SECONDS", help="no round of a load begins later")
    parser.add_argument("--batch", type=int, default=32, help="streams that the engine runs at once")
    parser.add_argument("--prompt", type=int, default=5000, help="words of a prompt that takes long")
    parser.add_argument("--model", default="/tmp/model", help="the tiny model, from which `throughput` makes a large one")
    parser.add_argument("--heavy-hidden", type=int, default=4096)
    parser.add_argument("--heavy-layers", type=int, default=32)
    parser.add_argument("--stranger-gb", type=int, default=40)
    args = parser.parse_args()
    # `timeout` ends this one so: what was started must not outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    world = World(args)
    try:
        for step in args.steps.split(","):
            begun = now()
            try:
                STEPS[step](world)
            except Exception as error:  # one step's failure must not cost the others' figures
                world.complain(step, f"{type(error).__name__}: {error}")
            world.say("took", of=step, seconds=round(now() - begun, 1))
    finally:
        if world.daemon and world.daemon.poll() is None:
            world.daemon.send_signal(signal.SIGTERM)
            try:
                world.daemon.wait(30)
            except subprocess.TimeoutExpired:
                world.daemon.kill()
        for process in ours(world):
            os.kill(process["pid"], signal.SIGKILL)
    world.say("verdict", wrong=world.wrong)
    return 1 if world.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
