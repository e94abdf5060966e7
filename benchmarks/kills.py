"""Kill every step at random moments, again and again, and look at what is left each time.

    python benchmarks/kills.py [ROUNDS]

A round kills each step three times in a row, all its processes at once, at moments drawn between
its start and its usual end, then runs it once more. After every kill each file under a final name
must be whole; after the last run the tree must be, byte for byte, that of an undisturbed run. Says
how many of the kills met a step at work. ROUNDS: 5 if it is not given.
"""

import collections
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parent.parent / folder) for folder in ('', 'tests', 'tests/tools')
]
import torch  # noqa: E402, F401, before decord
from helpers import kill_tree, start  # noqa: E402
from job import STEPS, Job, assert_undisturbed, assert_whole, make_job  # noqa: E402

KILLS = 3


def main() -> None:
    rounds, chance = int(sys.argv[1]) if len(sys.argv) > 1 else 5, random.Random(0)
    met = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        make_job(Path(name, 'job'))
        job = Job(Path(name, 'job'))
        for step in STEPS:
            usual = time_undisturbed(job, step, Path(name, 'undisturbed'))
            for number in range(rounds):
                root = Path(name, f'{step} {number}')
                shutil.copytree(job.before(step), root, symlinks=True)
                for _ in range(KILLS):
                    process = start(job.command(step, root))
                    time.sleep(chance.uniform(0, usual))
                    met[step] += process.poll() is None
                    kill_tree(process)
                    assert_whole(job, step, root)
                subprocess.run(job.command(step, root), check=True, capture_output=True)
                assert_undisturbed(job, step, root)
                shutil.rmtree(root)
            print(f'{step:<20}{met[step]:>4} of {rounds * KILLS} kills met it at work', flush=True)
    print(f'{met.total()} kills, {rounds * len(STEPS)} last runs: nothing lost, nothing left over')


def time_undisturbed(job: Job, step: str, root: Path) -> float:
    """Return the seconds that a step takes."""
    shutil.copytree(job.before(step), root, symlinks=True)
    began = time.perf_counter()
    subprocess.run(job.command(step, root), check=True, capture_output=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(root)
    return seconds


if __name__ == '__main__':
    main()
