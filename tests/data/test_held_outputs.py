"""A slow consumer on a stream of its own never reads a buffer that has been reused."""

from collections.abc import Callable, Iterator

import pytest
import torch

from scale_smog.data.loaders import held_outputs
from scale_smog.data.loaders.held_outputs import MOST_HELD, held_until_read

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
REUSED = -1


class Stream:
    """A GPU's queue: the host goes on, and the work is done when somebody lets it run."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], None]] = []

    def run(self, num: int | None = None) -> None:
        for _ in range(len(self.queued) if num is None else min(num, len(self.queued))):
            self.queued.pop(0)()

    def event(self) -> "Event":
        event = Event(self)
        self.queued.append(event.pass_by)
        return event


class Event:
    """Has passed when all that was queued before it has run."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.has_passed = stream, False

    def pass_by(self) -> None:
        self.has_passed = True

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        while not self.has_passed:
            self.stream.run(1)


class Buffer:
    """A library's: reused in the order of its own stream, which is at once."""

    def __init__(self, value: int, memory: dict[int, int]) -> None:
        self.place, self.memory = value, memory
        memory[self.place] = value

    def __del__(self) -> None:
        self.memory[self.place] = REUSED


@pytest.fixture
def stream(monkeypatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(held_outputs, "_event_after_queued_work", stream.event)
    return stream


def buffers(num: int) -> Iterator[Buffer]:
    memory: dict[int, int] = {}
    return (Buffer(i, memory) for i in range(num))


def consume(outputs: Iterator[Buffer], stream: Stream, speed: int) -> list[int]:
    """What the consumer's kernels read, `speed` of them for each batch."""
    read: list[int] = []
    for output in outputs:
        place, memory = output.place, output.memory
        del output
        stream.queued.append(lambda place=place, memory=memory: read.append(memory[place]))
        stream.run(speed)
    stream.run()
    return read


@pytest.mark.parametrize("speed", [0, 1, 10])
def test_every_buffer_is_read_before_it_is_reused_however_late(stream, speed):
    read = consume(held_until_read(buffers(20), GPU), stream, speed)
    assert read == list(range(20))


def test_without_being_held_they_are_not(stream):
    assert REUSED in consume(buffers(20), stream, 0)


def test_a_consumer_that_stops_early_has_read_too(stream):
    read: list[int] = []
    outputs = held_until_read(buffers(5), GPU)
    place, memory = (first := next(outputs)).place, first.memory
    del first
    stream.queued.append(lambda: read.append(memory[place]))
    outputs.close()
    assert read == [0]


def test_a_host_far_ahead_waits_and_a_fast_gpu_frees_at_once(stream):
    memory: dict[int, int] = {}
    slow = held_until_read((Buffer(i, memory) for i in range(50)), GPU)
    for _ in range(50):
        next(slow)
    assert sum(value != REUSED for value in memory.values()) <= MOST_HELD + 2
    slow.close()


def test_on_a_cpu_nothing_is_held():
    memory: dict[int, int] = {}
    for number, _ in enumerate(held_until_read((Buffer(i, memory) for i in range(9)), CPU)):
        assert sum(value != REUSED for value in memory.values()) <= 2, number
