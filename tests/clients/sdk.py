#!/usr/bin/env python3
"""What the openai and the anthropic SDK make of a server: JSON objects, one a line.

usage: sdk.py openai|anthropic BASE KEY MODEL talk      a stream, a whole answer, keys, a cancel, a time-out
       sdk.py openai|anthropic BASE KEY MODEL insist    one call, with the SDK's own retries
       sdk.py openai|anthropic BASE KEY MODEL hold      opens a stream, says so, and tells how it ended

Exit 1 only where something happens that no scenario is about.
"""
import json
import sys
import time

from engine_load import reaches

sdk, base, key, model, what = sys.argv[1:6]
ASKED = [{"role": "user", "content": "Tell me about the sea."}]
# The engine is told to go on: its answer is as long as was asked for.
ENDLESS = {"ignore_eos": True}


class OpenAi:
    import openai as module

    def client(self, header="bearer", shown=key, **more):
        fields = {}
        if header == "x-api-key":
            fields = {"Authorization": self.module.Omit(), "x-api-key": shown}
        return self.module.OpenAI(base_url=base + "/v1", api_key=shown, default_headers=fields, **more)

    def whole(self, client, tokens, **more):
        raw = client.chat.completions.with_raw_response.create(model=model, messages=ASKED, max_tokens=tokens, **more)
        answer, choice = raw.parse(), raw.parse().choices[0]
        return {"text": choice.message.content, "finish": choice.finish_reason,
                "tokens": answer.usage.completion_tokens, "request": raw.headers.get("x-request-id")}

    def stream(self, client, tokens, pieces):
        """Calls `pieces` with each piece of text; what is known at the end."""
        known = {"finish": None, "tokens": None}
        with client.chat.completions.create(
            model=model, messages=ASKED, max_tokens=tokens, stream=True,
            stream_options={"include_usage": True}, extra_body=ENDLESS,
        ) as stream:
            for chunk in stream:
                if chunk.usage:
                    known["tokens"] = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    known["finish"] = choice.finish_reason or known["finish"]
                    if choice.delta.content and pieces(choice.delta.content) == "enough":
                        return known
        return known


class Anthropic:
    import anthropic as module

    def client(self, header="x-api-key", shown=key, **more):
        shows = {"api_key": shown} if header == "x-api-key" else {"auth_token": shown, "api_key": None}
        return self.module.Anthropic(base_url=base, **shows, **more)

    def whole(self, client, tokens, **more):
        raw = client.messages.with_raw_response.create(model=model, messages=ASKED, max_tokens=tokens, **more)
        answer = raw.parse()
        return {"text": answer.content[0].text, "finish": answer.stop_reason,
                "tokens": answer.usage.output_tokens, "request": raw.headers.get("x-request-id")}

    def stream(self, client, tokens, pieces):
        with client.messages.stream(model=model, messages=ASKED, max_tokens=tokens, extra_body=ENDLESS) as stream:
            for text in stream.text_stream:
                if pieces(text) == "enough":
                    return None
            final = stream.get_final_message()
        return {"finish": final.stop_reason, "tokens": final.usage.output_tokens}


its = {"openai": OpenAi, "anthropic": Anthropic}[sdk]()


def say(**facts):
    print(json.dumps(facts), flush=True)


def error_of(call):
    """The name of the exception that a call ends with, its status where it has one, and the time it took."""
    begun = time.monotonic()
    try:
        call()
        name, status = None, 200
    except its.module.APIError as error:
        name, status = type(error).__name__, getattr(error, "status_code", None)
    return {"error": name, "status": status, "seconds": time.monotonic() - begun}


def talk():
    client = its.client(max_retries=0, timeout=60)
    pieces = []
    told = its.stream(client, 40, pieces.append)
    say(scenario="stream", pieces=len(pieces), text="".join(pieces), **told)
    named = its.whole(client, 40, extra_body=ENDLESS, extra_headers={"x-request-id": "of-the-client-1"})
    say(scenario="whole", **named)
    for header in ("bearer", "x-api-key"):
        good = its.client(header, max_retries=0)
        wrong = its.client(header, key + "x", max_retries=0)
        say(scenario=header, good=error_of(lambda: its.whole(good, 2)), wrong=error_of(lambda: its.whole(wrong, 2)))
    seen = []

    def until_three(piece):
        seen.append(piece)
        if len(seen) == 3:
            say(scenario="running", running=reaches(base, key, 1))
            return "enough"

    its.stream(client, 3000, until_three)
    say(scenario="cancelled", running=reaches(base, key, 0), pieces=len(seen))
    hasty = its.client(max_retries=0, timeout=1.5)
    # Some fifty seconds of work.
    late = error_of(lambda: its.whole(hasty, 3000, extra_body=ENDLESS))
    say(scenario="timed out", running=reaches(base, key, 0), **late)


def insist():
    exchanges = []

    def ended(response):
        after = response.headers.get("retry-after")
        exchanges.append({"status": response.status_code, "retry_after": after, "ended": time.monotonic()})

    def begins(request):
        exchanges.append({"begun": time.monotonic()})

    hooks = {"request": [begins], "response": [ended]}
    http = its.module.DefaultHttpxClient(event_hooks=hooks)
    client = its.client(max_retries=20, timeout=60, http_client=http)
    answer = its.whole(client, 5)
    begun = [exchange["begun"] for exchange in exchanges if "begun" in exchange]
    answers = [exchange for exchange in exchanges if "ended" in exchange]
    waits = [after - answer["ended"] for after, answer in zip(begun[1:], answers)]
    say(statuses=[it["status"] for it in answers], told=[it["retry_after"] for it in answers[:-1]],
        waited=waits, **answer)


def hold():
    seen = []

    def say_once(piece):
        seen.append(piece)
        if len(seen) == 3:
            say(begun=True)

    try:
        told = its.stream(its.client(max_retries=0, timeout=60), 3000, say_once)
        say(error=None, message="", **told)
    except Exception as error:  # which one it is, is what is asked
        say(error=type(error).__name__, message=str(error), pieces=len(seen))


{"talk": talk, "insist": insist, "hold": hold}[what]()
