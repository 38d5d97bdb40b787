"""Where cases run: here, or in a process of their own that is killed when it takes too long."""

import multiprocessing
import random
import shutil
import sys
from importlib import import_module
from pathlib import Path

from tests.fuzz.judge import Case, Result, judge

MEMORY = 6 * 2**30  # bytes that a process may ask for, where the system can hold it to that


class Area:
    """The cases of a module here: `prepare(folder)` makes what is valid, `make(valid, rng, folder)`
    a case in the folder.
    """

    def __init__(self, name: str, seed: int, scratch: Path):
        self.name = name
        self.seed = seed
        self.folder = scratch / "case"
        self.module = import_module(f"tests.fuzz.{name}")
        (scratch / "valid").mkdir(parents=True, exist_ok=True)  # after a restart it is there
        self.valid = self.module.prepare(scratch / "valid")

    def make(self, number: int) -> Case:
        """The case of this number; the one before it goes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        rng = random.Random(f"{self.seed} {self.name} {number}")
        return self.module.make(self.valid, rng, self.folder)

    def run(self, number: int) -> Result:
        return judge(self.make(number))


class Worker:
    """Runs cases one after the other in a process, which is begun anew after a hang or a crash."""

    def __init__(self, area: str, seed: int, scratch: Path, limit: float):
        self.area = area
        self.seed = seed
        self.scratch = scratch
        self.limit = limit  # seconds for a case
        self.process = None
        self.connection = None

    def run(self, number: int) -> Result:
        if self.process is None:
            self._start()
        about = "?"
        try:
            self.connection.send(number)
            for _ in range(2):  # what the case is about, then how it went
                if not self.connection.poll(self.limit):
                    self.stop()
                    return Result("hang", about, f"more than {self.limit:g} s")
                answer = self.connection.recv()
                if isinstance(answer, Result):
                    return answer
                about = answer
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self.stop()
            return Result("traceback", about, f"the process died, exit code {code}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # as Windows has it
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.area, self.seed, self.scratch)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # it is ready

    def stop(self, seconds: float = 0) -> None:
        """End the process, by force after so many seconds."""
        if self.process is not None:
            self.connection.close()
            self.process.join(seconds)
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection, area: str, seed: int, folder: Path) -> None:
    """The process: numbers come in, for each go out what the case is about and how it went."""
    _limit_memory()
    cases = Area(area, seed, folder)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if hasattr(cases.module, "warm_up"):
        cases.module.warm_up()
    connection.send("ready")
    while True:
        try:
            case = cases.make(connection.recv())
        except EOFError:  # the fuzzing has ended
            return
        connection.send(case.about)
        connection.send(judge(case))


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
