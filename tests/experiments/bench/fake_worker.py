"""A contestant without a model: answers `run` with the number in its argument and counts its calls."""

import sys

from experiments.bench.protocol import open_channel, serve

channel = open_channel()
print("a library's chatter on stdout")

calls = 0


def run() -> dict[str, float]:
    global calls
    calls += 1
    print("more chatter")
    return {"seconds": float(sys.argv[1]), "loss": 1.0, "calls": calls}


def fail() -> dict[str, float]:
    raise ValueError("no such luck")


def die() -> dict[str, float]:
    print("last words", file=sys.stderr, flush=True)
    sys.exit(3)


def hang() -> dict[str, float]:
    while True:
        sys.stdin.readline()
        __import__("time").sleep(0.05)


def garble() -> dict[str, float]:
    channel.write("not json\n")
    return {}


commands = {"run": run, "fail": fail, "die": die, "hang": hang, "garble": garble}
commands["warm"] = commands["peak"] = lambda: {"rates": {"8 square": 1e9}}
serve(channel, {"program": "fake", "variant": "only one"}, commands)
