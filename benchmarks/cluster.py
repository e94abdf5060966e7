"""Steps 3, 4 and 6 on local processes and on a Dask cluster of this machine, with 1, 2, ... workers
of one thread.

    python benchmarks/cluster.py --videos FOLDER

Prints seconds a clip (Step 6: a frame), medians of several rounds in turn. Starting the script is
in the figures, starting the cluster is not. Step 6 uses the tests' tiny detector, one thread a
worker on both sides.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        '--videos', type=Path, required=True, help='folder of real videos of ten seconds'
    )
    parser.add_argument('--clips', type=int, default=120, help='videos in the job')
    parser.add_argument('--rounds', type=int, default=3, help='runs of each side')
    parser.add_argument(
        '--workers',
        type=int,
        nargs='+',
        default=[1, os.cpu_count()],
        help='numbers of workers to try',
    )
    return parser.parse_args()


def write_job(args: argparse.Namespace, folder: Path) -> None:
    """Copy the videos under valid names; write their list and annotations."""
    videos = sorted(args.videos.glob('*.mp4'))
    names = [f'{index:011d}_000000_000010.mp4' for index in range(args.clips)]
    for index, name in enumerate(names):
        shutil.copy(videos[index % len(videos)], folder / name)
    (folder / 'list.txt').write_text(''.join(name + '\n' for name in names))
    (folder / 'kinetics_train_v1.0.csv').write_text(
        ''.join(f'{name[:11]},5.0,0.1,0.1,0.5,0.9,12\n' for name in names)
    )


class Cluster:
    """A scheduler and workers of one thread on this machine."""

    def __init__(self, folder: Path, workers: int):
        self.processes, self.folder = [], folder
        (folder / 'scheduler.json').unlink(missing_ok=True)
        self.start(
            'scheduler', '--port=0', '--host=127.0.0.1', f'--scheduler-file={folder}/scheduler.json'
        )
        while not (folder / 'scheduler.json').is_file():
            time.sleep(0.1)
        time.sleep(0.5)
        self.address = json.loads((folder / 'scheduler.json').read_text())['address']
        self.start('worker', self.address, f'--nworkers={workers}', '--nthreads=1')
        time.sleep(3 + workers)

    def start(self, *command: str) -> None:
        self.processes.append(
            subprocess.Popen(
                [sys.executable, '-m', 'dask', *command, '--no-dashboard'],
                cwd=self.folder,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def stop(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(script: str, *options) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, REPO / script, *options],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    return time.perf_counter() - start


def main() -> None:
    args, results = parse_args(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_job(args, folder)
        for _ in range(args.rounds):
            for workers in args.workers:
                for side in 'local', 'Dask':
                    cluster = Cluster(folder, workers) if side == 'Dask' else None
                    place = (
                        [f'--dask_scheduler={cluster.address}']
                        if cluster
                        else [f'--num_workers={workers}']
                    )
                    root = f'--avakinetics_root={folder}/root'
                    shutil.rmtree(folder / 'root', ignore_errors=True)
                    seconds = [
                        run(
                            'cut_kinetics.py',
                            f'--avakinetics_anotation={folder}',
                            root,
                            f'--kinetics_list={folder}/list.txt',
                            *place,
                        ),
                        run('extract_rgb_frames.py', root, *place),
                    ]
                    run('prepare_annotation.py', f'--avakinetics_anotation={folder}', root)
                    if (
                        cluster or workers == 1
                    ):  # without GPUs, Step 6 is one process, whatever --num_workers
                        seconds.append(
                            run(
                                'fetch_proposal.py',
                                root,
                                f'--config={REPO}/tests/tiny_detector.py',
                                f'--checkpoint={REPO}/tests/tiny_detector.pth',
                                *(place if cluster else []),
                            )
                            / 3
                        )
                    if cluster:
                        cluster.stop()
                    for step, value in zip((3, 4, 6), seconds):
                        results.setdefault((step, side, workers), []).append(value / args.clips)
    print(f'{"step":>5}{"":>4}{"workers":>9}{"s a clip or frame":>20}')
    for (step, side, workers), values in sorted(results.items()):
        print(
            f'{step:>5} {side:<6}{workers:>6}{statistics.median(values):>12.3f} '
            f'({min(values):.3f} to {max(values):.3f})'
        )


if __name__ == '__main__':
    main()
