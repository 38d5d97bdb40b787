"""How times are taken: ours and a peer's run in turn, in one process, on one thread.

A *case* is one piece of work, done by us and by a peer. It is run once by both to warm up, then
`repeats` times in turn; who begins changes each time. What counts are CPU seconds, the wall's stand
beside them. The *ratio* is the peer's seconds divided by ours, repeat by repeat, and its median.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from experiments.speed.sizes import M, S, Size, T
from report import Section, Table, print_tables
from runtime import parse_settings, run, set_threads


@dataclass
class Settings:
    repeats: int = 5  # of each case, after one to warm up
    only: str = ""  # only the cases whose name holds this, such as "M, bfloat16"
    tiny: bool = False  # a tiny model and little work: to see that all of it runs
    llama2c: str = ""  # a folder with llama2.c's run.c, to be compiled; empty: left out

    @property
    def small(self) -> Size:
        """Size S."""
        return T if self.tiny else S

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Both sizes."""
        return (T,) if self.tiny else (S, M)

    def few(self, count: int) -> int:
        """So much work, or the least with --tiny."""
        return 2 if self.tiny else count


# ---- times ----


@dataclass(frozen=True)
class Time:
    """Seconds of one run."""

    cpu: float
    wall: float


def now() -> Time:
    """The clocks."""
    return Time(time.process_time(), time.perf_counter())


def between(start: Time, end: Time) -> Time:
    """From one moment to the other."""
    return Time(end.cpu - start.cpu, end.wall - start.wall)


def time_whole(action: Callable[[], object]) -> Time:
    """Seconds of `action`, from its first line to its last."""
    gc.collect()  # nobody pays for what was left over before
    start = now()
    action()
    return between(start, now())


def time_steps(action: Callable[[], object], updates: int = 1) -> Time:
    """Seconds of all training steps of `action`, start and finish left out.

    A step ends where an optimiser has changed the weights for the `updates`-th time. The first step
    only starts the clock; it is taken to last as long as the others on average.
    """
    moments = []

    def note(*_) -> None:
        moments.append(now())

    gc.collect()
    hook = register_optimizer_step_post_hook(note)
    try:
        action()
    finally:
        hook.remove()
    ends = moments[updates - 1 :: updates]
    seen = between(ends[0], ends[-1])
    scale = len(ends) / (len(ends) - 1)
    return Time(seen.cpu * scale, seen.wall * scale)


# ---- cases and rows ----


@dataclass
class Case:
    """A piece of work, and who does it."""

    kind: str  # such as "training step"
    name: str  # such as "S, float32"
    unit: str  # of what is done, such as "tokens"
    amount: float  # so many of them are done in the time that `ours` returns
    ours: Callable[[], Time]
    theirs: Callable[[], Time] | None  # None: skipped, for the reason below
    peer: str  # who they are, such as "transformers"
    skipped: str = ""  # why there is no peer
    target: float | None = None  # the ratio that is wanted
    flops: float = 0.0  # least number of operations of matrix products in a run; 0: not told
    bytes_read: float = 0.0  # where reading the weights is the limit: bytes of a run; 0: it is not
    dtype: torch.dtype = torch.float32
    most_repeats: int = 100  # where a run takes long


@dataclass
class Row:
    """What a case gave."""

    kind: str
    name: str
    unit: str
    amount: float
    peer: str
    skipped: str
    target: float | None
    dtype: str
    ours: list[Time]  # a time for each repeat
    theirs: list[Time] = field(default_factory=list)
    share: float | None = None  # of the machine's matmul speed, or of its reading speed
    share_of: str = ""  # "matmul" or "reading"

    @property
    def speed(self) -> float:
        """Units a CPU second, ours."""
        return self.amount / median(self.ours)

    @property
    def peer_speed(self) -> float | None:
        """Units a CPU second, the peer's."""
        return self.amount / median(self.theirs) if self.theirs else None

    def ratios(self, clock: str = "cpu") -> list[float]:
        """The peer's seconds divided by ours, of each repeat."""
        pairs = zip(self.ours, self.theirs, strict=False)
        return [getattr(theirs, clock) / getattr(ours, clock) for ours, theirs in pairs]

    @property
    def ratio(self) -> float | None:
        """The median ratio of CPU seconds: above 1 we are faster."""
        return statistics.median(self.ratios()) if self.theirs else None

    def to_json(self) -> dict:
        row = asdict(self)
        row["speed"] = self.speed
        row["peer_speed"] = self.peer_speed
        row["ratio"] = self.ratio
        row["wall_ratio"] = statistics.median(self.ratios("wall")) if self.theirs else None
        return row

    @classmethod
    def from_json(cls, row: dict) -> "Row":
        kept = {name: row[name] for name in cls.__dataclass_fields__}
        kept["ours"] = [Time(**one) for one in row["ours"]]
        kept["theirs"] = [Time(**one) for one in row["theirs"]]
        return cls(**kept)


def median(times: list[Time]) -> float:
    """The median of their CPU seconds."""
    return statistics.median(time.cpu for time in times)


def run_case(case: Case, repeats: int) -> Row:
    """Both in turn. The machine's own speed is measured beside them, for the share of it."""
    runs = {"ours": case.ours}
    if case.theirs is not None:
        runs["theirs"] = case.theirs
    times = {"ours": [], "theirs": []}
    matmul = []
    reading = []
    for action in runs.values():
        action()  # warms up
    for repeat in range(min(repeats, case.most_repeats)):
        matmul.append(matmul_speed(case.dtype))
        reading.append(reading_speed())
        order = list(runs)
        if repeat % 2:
            order.reverse()
        for name in order:
            times[name].append(runs[name]())

    share, share_of = None, ""
    seconds = median(times["ours"])
    if case.bytes_read:
        share, share_of = case.bytes_read / seconds / max(reading), "reading"
    elif case.flops:
        share, share_of = case.flops / seconds / max(matmul), "matmul"
    return Row(
        kind=case.kind,
        name=case.name,
        unit=case.unit,
        amount=case.amount,
        peer=case.peer,
        skipped=case.skipped,
        target=case.target,
        dtype=str(case.dtype).removeprefix("torch."),
        share=share,
        share_of=share_of,
        **times,
    )


def run_cases(cases: Iterable[Case], settings: Settings) -> Iterator[Row]:
    """The rows of all cases that are wanted, each printed as it comes."""
    for case in cases:
        if settings.only not in case.name:
            continue
        row = run_case(case, settings.repeats)
        print(" | ".join([row.kind, *cells(row)]), flush=True)
        yield row


# ---- the machine ----

MATMULS = [(1024, 512, 1376), (1024, 1024, 1024)]  # rows, inner dimension, columns


def matmul_speed(dtype: torch.dtype = torch.float32) -> float:
    """Operations a CPU second of a large matrix product: the best of some shapes and runs."""
    best = 0.0
    for rows, inner, columns in MATMULS:
        left = torch.randn(rows, inner).to(dtype)
        right = torch.randn(columns, inner).to(dtype)
        for _ in range(2):
            seconds = time_whole(lambda: F.linear(left, right)).cpu  # noqa: B023 (called at once)
            best = max(best, 2 * rows * inner * columns / seconds)
    return best


def reading_speed(megabytes: int = 128) -> float:
    """Bytes a CPU second at which a matrix beyond the caches is read: the best of three."""
    columns = 4096
    matrix = torch.ones(megabytes * 2**20 // 4 // columns, columns)
    vector = torch.ones(columns)
    seconds = min(time_whole(lambda: matrix @ vector).cpu for _ in range(3))
    return matrix.nbytes / seconds


def describe_machine() -> dict:
    """Processor, threads, versions, and the machine's own speeds."""
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        speeds[name] = matmul_speed(dtype)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions("torch", "transformers", "trl", "accelerate", "datasets"),
        "matmul": speeds,  # operations a second
        "reading": reading_speed(),  # bytes a second
    }


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ---- tables ----

COLUMNS = ["", "ours", "peer", "ratio", "from, to", "target", "share"]


def cells(row: Row) -> list[str]:
    """A row of the table."""
    ours = f"{shown(row.speed)} {row.unit}/s"
    share = ""
    if row.share is not None:
        share = f"{row.share:.0%} of {row.share_of}"
    target = f"{row.target:g}" if row.target else ""
    if row.ratio is None:
        return [row.name, ours, f"{row.peer}: {row.skipped}", "", "", target, share]
    ratios = row.ratios()
    spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
    theirs = f"{row.peer}: {shown(row.peer_speed)}"
    return [row.name, ours, theirs, f"{row.ratio:.2f}", spread, target, share]


def shown(number: float) -> str:
    """Three digits are enough.

    >>> shown(1234.5), shown(12.34)
    ('1,230', '12.3')
    """
    if number >= 100:
        digits = len(str(int(number))) - 3
        return f"{round(number, -digits):,.0f}"
    return f"{number:.3g}"


def table(kind: str, rows: list[Row]) -> Table:
    """All rows of a kind of work."""
    return Table(kind, COLUMNS, [cells(row) for row in rows])


def main(cases: Callable[[Settings], Iterable[Case]], description: str) -> None:
    """The command of one kind of work: prints its table."""

    def measure() -> None:
        settings = parse_settings(Settings, description)
        set_threads(1)
        rows = list(run_cases(cases(settings), settings))
        kinds = dict.fromkeys(row.kind for row in rows)
        tables = [table(kind, [row for row in rows if row.kind == kind]) for kind in kinds]
        print_tables([Section("Units a CPU second, one thread", tables)])

    run(measure)
