#!/usr/bin/env python3
"""Step 5: write the annotations of the clips that are there, as MMAction2 reads them.

Reads the AVA-Kinetics annotations (kinetics_train_v1.0.csv) and the clip folders in ROOT/rawframes, whatever made
them, or the clips in ROOT/videos where no raw frames were made, and writes ROOT/kinetics_train.csv: a row
`<clip>,<second>,x1,y1,x2,y2,action_id,-1` for each annotation, in the order of the annotation file, on the clip in
which its keyframe is most centred. A clip that lacks frames is not used. What could not be used is in
ROOT/reports/prepare_annotation_train.csv with its reason. With `--split val`, all names have val in place of train.

    python3 prepare_annotation.py --avakinetics_anotation=./ava_kinetics_v1_0 \\
        --avakinetics_root=$MMACTION2/data/ava_kinetics
"""
import signal

if __name__ == '__main__':  # a Ctrl-C during the imports waits for their end: a line in place of a traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

import argparse
import contextlib
import csv
import logging
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Iterable, Iterator

import av
import filelock
from joblib import Parallel, delayed, parallel_config
from joblib.parallel import get_active_backend
from tqdm import tqdm

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
FPS = 30
CLIP_NAME = re.compile(r'(?P<id>[A-Za-z0-9_-]{11})_(?P<start>[0-9]{6})_(?P<end>[0-9]{6})')
MAX_DASK_WORKERS = 1000  # twice as many tasks wait in the cluster
BATCH = 64  # clip folders looked through by one task


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Step 5: write the annotations of the clips that are there, as MMAction2 reads them.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--avakinetics_anotation', '--avakinetics_annotation', type=Path,
                        default=Path('ava_kinetics_v1_0'), metavar='DIR',
                        help='folder of the AVA-Kinetics annotations')
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made')
    parser.add_argument('--split', choices=['train', 'val'], default='train', help='part of AVA-Kinetics')
    parser.add_argument('--num_workers', type=int, default=-1, metavar='N', help='parallel processes; -1: all CPUs')
    parser.add_argument('--dask_scheduler', metavar='ADDRESS', default=argparse.SUPPRESS,
                        help='work on the Dask cluster of this scheduler, such as tcp://host:8786, not on this machine')
    args = argparse.Namespace(**{'dask_scheduler': None, **vars(parser.parse_args(argv))})
    args.num_workers = args.num_workers if args.num_workers > 0 else -1
    return args


def parse_annotation(line: str) -> tuple[str, float, list[float] | None, int | None]:
    """A row of the annotations as (video id, timestamp in s, relative box x1 y1 x2 y2, action id).

    A row of two columns names a keyframe without people: its box is None. Raises ValueError for any other row.
    """
    row = [field.strip().strip('"') for field in line.split(',')]
    if len(row) not in (2, 7):
        raise ValueError(f'{len(row)} columns instead of 7 or 2')
    if not re.fullmatch(r'[A-Za-z0-9_-]{11}', row[0]):
        raise ValueError(f'not a video id, {row[0][:20]!r}')
    numbers = [float(field) for field in row[1:]]
    if not 0 <= numbers[0] < 1e6:  # also false for NaN
        raise ValueError(f'not a time in seconds, {row[1][:20]}')
    if len(row) == 2:
        return row[0], numbers[0], None, None
    box, action = numbers[1:5], numbers[5]
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError('not a box, ' + ' '.join(field[:12] for field in row[2:6]))
    if not (action.is_integer() and 1 <= action <= 80):
        raise ValueError(f'not an action of 1 to 80, {row[6][:20]}')
    return row[0], numbers[0], box, int(action)


def read_annotations(path: Path) -> Iterator[tuple | str]:
    """What `parse_annotation` makes of each line, or what is wrong with it."""
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield parse_annotation(line)
                except ValueError as error:
                    yield f'malformed annotation: line {number}: {error}'


def missing_frames(clips: list[Path]) -> dict[str, str | None]:
    """By clip, a folder or a video, what it lacks, or None where all frames that its name promises are there."""
    answers = {}
    for clip in clips:
        name = CLIP_NAME.fullmatch(clip.stem)
        total = (int(name['end']) - int(name['start'])) * FPS
        try:
            if clip.suffix:
                with av.open(str(clip), format='mov') as video:
                    count = sum(packet.size > 0 for packet in video.demux(video=0))
                answers[clip.stem] = f'frames missing: {total - count} of {total}' if count < total else None
                continue
            present = set(os.listdir(clip))
        except (av.FFmpegError, IndexError):
            answers[clip.stem] = 'unreadable clip: no video'
            continue
        except OSError as error:
            answers[clip.stem] = f'unreadable clip: {error.strerror}'
            continue
        missing = [index for index in range(1, total + 1) if f'img_{index:05d}.jpg' not in present]
        answers[clip.stem] = (f'frames missing: {len(missing)} of {total}, first img_{missing[0]:05d}.jpg' if missing
                              else None)
    return answers


def find_clips(root: Path, videos: set[str]) -> list[Path]:
    """The clips of the videos in ROOT/rawframes or, where none has raw frames, in ROOT/videos. AVA's have other names."""
    for folder, suffix in (root / 'rawframes', ''), (root / 'videos', '.mp4'):
        names = (os.path.splitext(entry.name) for entry in os.scandir(folder)) if folder.is_dir() else ()
        names = [(CLIP_NAME.fullmatch(name), extension) for name, extension in names]
        clips = sorted(name[0] for name, extension in names if name and extension == suffix
                       and name['id'] in videos and name['start'] < name['end'])
        if clips:
            return [folder / (clip + suffix) for clip in clips]
    return []


def choose_clip(clips: list[tuple[int, int, str]], second: int) -> str | None:
    """The clip (start, end, name) in which the second is most centred, if any holds it."""
    holding = [clip for clip in clips if clip[0] <= second < clip[1]]
    return min(holding, key=lambda clip: abs(clip[0] + clip[1] - 2 * second))[2] if holding else None


@contextlib.contextmanager
def workspace(path: Path):
    """A folder for unfinished files that belongs to this run alone, emptied before and removed after."""
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / 'lock')  # the kernel lets go when this process ends, however it ends
    try:
        lock.acquire(blocking=False)
    except (filelock.Timeout, FileNotFoundError):  # the latter where the other run has just ended
        sys.exit(f'error: another run of this step is at work in {path.parent}; wait for it to end')
    try:
        for leftover in set(path.iterdir()) - {path / 'lock'}:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()


@contextlib.contextmanager
def in_parallel(tasks: Iterable, args: argparse.Namespace, **options):
    """The answers of joblib tasks as they come, from local processes or the cluster of --dask_scheduler."""
    with dask_cluster(args.dask_scheduler) if args.dask_scheduler else contextlib.nullcontext():
        os.environ['PYTHONWARNINGS'] = 'ignore'  # joblib would warn of what an interruption leaves, here and in processes
        warnings.filterwarnings('ignore', module='joblib')
        # workers inherit that these are ignored: interruptions are for this process alone
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        answers = Parallel(n_jobs=args.num_workers, return_as='generator_unordered', **options)(tasks)
        with contextlib.closing(answers):  # which ends the tasks that are under way, when this run is interrupted
            for number, handler in handlers.items():
                signal.signal(number, handler)
            try:
                yield answers
            except BrokenProcessPool:
                sys.exit('error: a worker process was killed, as it happens when memory runs out; use fewer with '
                         '--num_workers, then the same command continues')


@contextlib.contextmanager
def dask_cluster(address: str):
    """Send joblib's work to the Dask cluster of the scheduler at this address."""
    try:
        import distributed
    except ImportError:
        sys.exit('error: --dask_scheduler needs Dask; pip install distributed')
    logging.disable()  # Dask logs what is told below, with tracebacks
    try:
        client = distributed.Client(address, timeout=10)
        client.wait_for_workers(1, timeout=30)
    except Exception as error:  # whatever answers at such an address
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sys.exit(f'error: no Dask scheduler with workers at {address} ({reason}); start them first')

    def submit(task, callback=None):
        job = submit_quietly(task, callback)
        job.add_done_callback(lambda job: job.exception() and callback(job.exception()))
        return job

    with client, parallel_config('dask', client=client):
        # joblib 1.6 tells nobody of a task whose workers died time and again, and waits for it for ever; it would work
        # here where one worker has joined so far, and send no more than that many need where others join later
        backend = get_active_backend()[0]
        submit_quietly, backend.submit, backend.effective_n_jobs = backend.submit, submit, lambda n_jobs: MAX_DASK_WORKERS
        try:
            yield client
        except (CancelledError, distributed.KilledWorker) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            sys.exit(f'error: the Dask cluster at {address} failed ({reason}); mend it, then the same command continues')


def write_report(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a csv beside its final name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])
    os.replace(path.with_suffix('.part'), path)


def prepare(args: argparse.Namespace, root: Path, annotations: Path, work: Path) -> None:
    """Look through the clips, write the csv and the report, say what came of it."""
    videos = {row[0] for row in read_annotations(annotations) if isinstance(row, tuple) and row[2]}
    clips = find_clips(root, videos)
    if not clips:
        sys.exit(f'error: {root} holds no clip of the {len(videos)} videos annotated in {annotations}; '
                 'do Step 3 (cut_kinetics.py) first')
    batches, problems = [clips[index:index + BATCH] for index in range(0, len(clips), BATCH)], {}
    tasks = (delayed(missing_frames)(batch) for batch in batches)
    with in_parallel(tasks, args) as answers, tqdm(total=len(clips), desc='look through', unit='clip', delay=1) as bar:
        for answer in answers:
            problems.update(answer)
            bar.update(len(answer))

    usable, unusable = {}, {}
    for name, problem in sorted(problems.items()):
        clip = (int(name[-13:-7]), int(name[-6:]), name)
        (unusable if problem else usable).setdefault(name[:-14], []).append(clip)
    target, rows, lost, malformed = root / f'kinetics_{args.split}.csv', 0, {}, []
    keyframes, unpeopled, used = set(), set(), set()
    with open(work / target.name, 'w') as file:
        for row in read_annotations(annotations):
            if isinstance(row, str):
                malformed.append(('', '', row))
                continue
            video, timestamp, box, action = row
            second = int(timestamp)  # MMAction2 names a keyframe by the integer part; real ones are 0 to 0.17 s later
            if not box:
                unpeopled.add((video, second))
                continue
            clip = choose_clip(usable.get(video, ()), second)
            if clip:
                file.write('{},{},{:.3f},{:.3f},{:.3f},{:.3f},{},-1\n'.format(clip, second, *box, action))
                keyframes.add((video, second))
                used.add(clip)
                rows += 1
            else:
                broken = choose_clip(unusable.get(video, ()), second)
                lost[video, second] = f'{problems[broken]} in {broken}' if broken else 'no clip holds this keyframe'
    report = root / f'reports/prepare_annotation_{args.split}.csv'
    write_report(report, ['video_id', 'timestamp', 'reason'],
                 sorted((*key, reason) for key, reason in lost.items()) + malformed)
    if not rows:
        sys.exit(f'error: not one annotation has its frames; {report} says why')
    os.replace(work / target.name, target)
    print(f'{rows} rows in {target}: {len(keyframes)} of {len(keyframes) + len(lost)} annotated keyframes, '
          f'on {len(used)} clips, by their {"raw frames" if clips[0].suffix == "" else "videos"}')
    for reason, count in Counter(reason.split(':')[0] for reason in lost.values()).most_common():
        print(f'  {count} keyframes left out: {reason}')
    if unpeopled:
        print(f'  {len(unpeopled - keyframes - lost.keys())} keyframes without people: nothing to prepare')
    if malformed:
        print(f'  {len(malformed)} lines skipped: malformed annotation')
    print(f'  report: {report}')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    root = args.avakinetics_root.absolute()
    annotations = args.avakinetics_anotation / f'kinetics_{args.split}_v1.0.csv'
    if not annotations.is_file():
        sys.exit(f'error: {annotations} not found; do Step 2 or set --avakinetics_anotation')
    if not (root / 'rawframes').is_dir() and not (root / 'videos').is_dir():
        sys.exit(f'error: {root} has neither rawframes nor videos; do Step 3 (cut_kinetics.py) or set --avakinetics_root')

    with workspace(root / f'.prepare_annotation_{args.split}') as work:
        prepare(args, root, annotations, work)


if __name__ == '__main__':
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        main()
    except KeyboardInterrupt:
        print('interrupted; the same command continues', file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; mend it, then the same command continues')
    finally:  # nothing is left to interrupt
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
