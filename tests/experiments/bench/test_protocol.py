import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.bench.protocol import Worker, WorkerError, closing_all, interleave

FAKE = str(Path(__file__).with_name("fake_worker.py"))
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: dict[str, Worker] = {}

    def make(name: str, seconds: float = 1.0) -> Worker:
        workers[name] = Worker(name, [sys.executable, FAKE, str(seconds)], env=ENV)
        return workers[name]

    with closing_all(workers):
        yield make


def running(worker: Worker) -> bool:
    return worker._process.poll() is None


def test_answers_are_not_mixed_with_what_libraries_print(start: Callable[..., Worker]) -> None:
    worker = start("a", 0.5)
    assert worker.hello() == {"program": "fake", "variant": "only one"}
    assert worker.ask("run") == {"seconds": 0.5, "loss": 1.0, "calls": 1}
    assert worker.ask("run")["calls"] == 2


def test_rounds_ask_everyone_once_and_turn_the_order(start: Callable[..., Worker]) -> None:
    workers = {"a": start("a", 1.0), "b": start("b", 2.0)}
    asked: list[str] = []
    for name, worker in workers.items():
        worker.hello()
        ask = worker.ask
        worker.ask = lambda command, name=name, ask=ask: asked.append(name) or ask(command)  # type: ignore[method-assign]
    rounds: list[int] = []
    answers = interleave(workers, 3, after=rounds.append)
    assert asked == ["a", "b", "b", "a", "a", "b"]
    assert rounds == [0, 1, 2]
    assert [answer["calls"] for answer in answers["b"]] == [1, 2, 3]
    assert {answer["seconds"] for answer in answers["b"]} == {2.0}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fail", "worker a failed at 'fail': ValueError: no such luck"),
        ("dance", "unknown command 'dance'"),
        ("garble", "answered 'not json', expected one JSON object"),
    ],
)
def test_a_failing_command_is_named(start: Callable[..., Worker], command: str, message: str) -> None:
    worker = start("a")
    worker.hello()
    with pytest.raises(WorkerError, match=message.replace("(", r"\(")):
        worker.ask(command)


def test_a_dead_worker_leaves_its_last_words(start: Callable[..., Worker]) -> None:
    worker = start("a")
    worker.hello()
    with pytest.raises(WorkerError, match=r"exit status 3\n(?s:.*)last words"):
        worker.ask("die")
    with pytest.raises(WorkerError, match="it has ended"):
        worker.ask("run")


def test_a_worker_that_cannot_start_says_why() -> None:
    worker = Worker("broken", [sys.executable, "-c", "raise SystemExit('no model here')"])
    with pytest.raises(WorkerError, match=r"'start': it ended with exit status 1\nno model here"):
        worker.hello()
    worker.close()


def test_workers_end_with_the_block_also_when_one_hangs_or_the_asker_is_interrupted() -> None:
    workers: dict[str, Worker] = {}

    def asker() -> None:
        for name in ("idle", "stuck"):
            workers[name] = Worker(name, [sys.executable, FAKE, "1"], env=ENV)
            workers[name].hello()
        stdin = workers["stuck"]._process.stdin
        assert stdin is not None
        stdin.write("hang\n")
        stdin.flush()
        assert running(workers["idle"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), closing_all(workers):
        asker()
    assert not running(workers["idle"])
    assert not running(workers["stuck"])
