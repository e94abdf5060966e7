#!/usr/bin/env python3
"""Step 7a: merge the Kinetics part into AVA's annotations.

Reads ROOT/kinetics_train.csv, ROOT/kinetics_proposal.pkl and ROOT/annotations, a copy of AVA's annotation folder, and
puts the Kinetics rows before AVA's in annotations/ava_train_v2.2.csv and the proposals of both into
annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl; where keys collide, AVA's stay. AVA's own two files are kept
beside them as *.ava_only.csv and *.ava_only.pkl, and every merge starts from these: merging twice is merging once.

With --split val, AVA's files stay as they are, so that published AVA figures can still be reproduced: both parts go into
new files, annotations/ava_kinetics_val_v2.2.csv and annotations/ava_kinetics_dense_proposals_val.pkl.

    cp -r $MMACTION2/data/ava/annotations/ $MMACTION2/data/ava_kinetics/
    python3 merge_annotations.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""
import signal

if __name__ == '__main__':  # a Ctrl-C during the imports waits for their end: a line in place of a traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

import argparse
import contextlib
import csv
import io
import os
import pickle
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Iterator

import filelock
import numpy as np

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
# split -> Kinetics' rows and proposals in ROOT, AVA's in ROOT/annotations, the merged ones in ROOT/annotations
FILES = {'train': (('kinetics_train.csv', 'kinetics_proposal.pkl'),
                   ('ava_train_v2.2.csv', 'ava_dense_proposals_train.FAIR.recall_93.9.pkl'),
                   ('ava_train_v2.2.csv', 'ava_dense_proposals_train.FAIR.recall_93.9.pkl')),
         'val': (('kinetics_val.csv', 'kinetics_val_proposal.pkl'),
                 ('ava_val_v2.2.csv', 'ava_dense_proposals_val.FAIR.recall_93.9.pkl'),
                 ('ava_kinetics_val_v2.2.csv', 'ava_kinetics_dense_proposals_val.pkl'))}
MERGED = b'\nmerged by merge_annotations.py\n'  # after the end of a merged pickle, where no reader looks
VIDEO = re.compile(r'[A-Za-z0-9_-]{11}')
CLIP = re.compile(r'[A-Za-z0-9_-]{11}_[0-9]{6}_[0-9]{6}')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step 7a: merge the Kinetics part into AVA's annotations.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--avakinetics_root', type=Path, default=MMACTION2 / 'data/ava_kinetics', metavar='DIR',
                        help='folder of the data set that is made')
    parser.add_argument('--split', choices=['train', 'val'], default='train', help='part of AVA-Kinetics')
    return parser.parse_args(argv)


def read_rows(path: Path, name: re.Pattern, problems: list[tuple]) -> Iterator[tuple[str, str]]:
    """(video or clip, line) for every row that MMAction2 can read and whose first column is such a name.

    Rows are `name,second,x1,y1,x2,y2,action_id,entity_id`; what is wrong with the others is added to `problems`.
    """
    with open(path, encoding='utf-8-sig', errors='replace') as file:
        for number, line in enumerate(file, 1):
            row = line.strip().split(',')
            if row == ['']:
                continue
            try:
                int(row[1]), int(row[6]), int(row[7])
                readable = name.fullmatch(row[0]) and np.isfinite([float(value) for value in row[2:6]]).all()
            except (ValueError, IndexError):
                readable = False
            if readable:
                yield row[0], line.strip()
            else:
                problems.append(('', '', f'malformed row: line {number} of {path.name}'))


class DType:
    """Stands for numpy.dtype while a pickle is read: its code, such as 'f8', and the byte order that follows."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, ''

    def __setstate__(self, state: tuple):
        self.order = state[1]


class Array:
    """Stands for numpy.ndarray while a pickle is read, since NumPy's own code trusts the sizes that a pickle claims."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, 'F' if fortran else 'C')

    def fill(self, data: bytes, dtype: DType, shape: tuple, order: str) -> 'Array':
        if re.fullmatch('[<>=|]?[fiu][1248]', dtype.order + dtype.code.lstrip('<>=|')):  # else not numbers: no value
            self.value = np.frombuffer(data, (dtype.order or dtype.code[:-2]) + dtype.code[-2:]).reshape(shape, order=order)
        return self


class Unpickler(pickle.Unpickler):
    """Reads arrays of numbers and plain Python values only: a pickle that names anything else could run code."""

    def find_class(self, module, name):
        if (module, name) == ('numpy', 'ndarray'):
            return Array
        if (module, name) == ('numpy', 'dtype'):
            return DType
        if module in ('numpy.core.multiarray', 'numpy._core.multiarray') and name == '_reconstruct':
            return Array  # the state that follows fills it
        if module in ('numpy.core.numeric', 'numpy._core.numeric') and name == '_frombuffer':  # protocol 5
            return lambda data, dtype, shape, order: Array().fill(data, dtype, shape, order)
        if (module, name) == ('_codecs', 'encode'):  # how protocol 2 writes bytes
            return lambda text, encoding: text.encode('latin1')
        raise pickle.UnpicklingError(f'it names {module}.{name}')


@contextlib.contextmanager
def memory_for(path: Path):
    """Let this process take so much more memory as reading a pickle can need, since a small one may claim any amount."""
    statm, limits = Path('/proc/self/statm'), resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.is_file() else 2 ** 40  # macOS has none
    most = taken + 20 * path.stat().st_size + 2 ** 30  # 4 to 6 times the file were measured
    resource.setrlimit(resource.RLIMIT_AS, (most if limits[1] < 0 else min(most, limits[1]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Pickler(pickle.Pickler):
    """Writes arrays so that NumPy 1.21 to 2.x can read them: by public names, `numpy._core` is unknown to NumPy 1."""

    def reducer_override(self, value):
        if type(value) is np.ndarray:
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


def read_proposals(path: Path, problems: list[tuple]) -> dict[str, np.ndarray]:
    """The proposals of a pickle, key '<video_id>,<second:04d>' -> (n, 5); malformed ones are added to `problems`."""
    try:
        with open(path, 'rb') as file, memory_for(path):
            loaded = Unpickler(file).load()
    except (pickle.UnpicklingError, ValueError, TypeError, EOFError, IndexError, KeyError, AttributeError, MemoryError,
            ImportError, OverflowError, RecursionError, UnicodeError) as error:
        sys.exit(f'error: {path} is no pickle of proposals: {type(error).__name__} {error}'.replace('\n', ' ').rstrip())
    if not isinstance(loaded, dict):
        sys.exit(f'error: {path} is no pickle of proposals: it holds a {type(loaded).__name__}, not a dict')
    proposals = {}
    for key, boxes in loaded.items():
        boxes = getattr(boxes, 'value', None)
        if (isinstance(key, str) and re.fullmatch(r'[A-Za-z0-9_-]{11},\d{4,}', key) and isinstance(boxes, np.ndarray)
                and boxes.ndim == 2 and boxes.shape[1] in (4, 5) and boxes.dtype.kind == 'f' and len(boxes)
                and np.isfinite(boxes).all()):
            proposals[key] = boxes
        else:
            problems.append(('', '', f'malformed proposal: {str(key)[:40]!r} in {path.name}'))
    return proposals


def original_of(path: Path) -> Path:
    """Where the first merge keeps AVA's own file."""
    return path.with_suffix('.ava_only' + path.suffix)


def own_file(path: Path, merged: bool, copy_ava: str) -> Path:
    """AVA's own file: `path` or, where that is merged already, the one that the first merge kept beside it."""
    if merged and not original_of(path).is_file():
        sys.exit(f'error: {path} holds Kinetics already, merged by another program; {copy_ava}')
    return original_of(path) if merged else path


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


def write_report(path: Path, header: list[str], rows: list[tuple]) -> None:
    """Write a csv beside its final name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.part'), 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file, lineterminator='\n').writerows([header, *rows])
    os.replace(path.with_suffix('.part'), path)


def merge(args: argparse.Namespace, copy_ava: str, work: Path) -> None:
    """Join the rows and the proposals of both parts, write the two files and the report, say what came of it."""
    root, notes, (kinetics_names, own_names, merged_names) = args.avakinetics_root, work.parent, FILES[args.split]
    merged_csv, merged_pickle = (notes / name for name in merged_names)
    problems = []
    kinetics = list(read_rows(root / kinetics_names[0], CLIP, problems))
    path = notes / own_names[0]
    own_csv = own_file(path, bool(re.search(rf'^{CLIP.pattern},'.encode(), path.read_bytes(), re.M)), copy_ava)
    ava = list(read_rows(own_csv, VIDEO, problems))
    path = notes / own_names[1]
    own_pickle = own_file(path, path.read_bytes().endswith(MERGED), copy_ava)
    ava_proposals = read_proposals(own_pickle, problems)
    of_kinetics = {name[:11] for name, _ in kinetics} - {name for name, _ in ava}
    own_file(notes / own_names[1], any(key[:11] in of_kinetics for key in ava_proposals), copy_ava)
    proposals = read_proposals(root / kinetics_names[1], problems)
    for path, rows in (root / kinetics_names[0], kinetics), (own_csv, ava):
        if not rows:
            sys.exit(f'error: {path} holds no row of annotations; make it anew')
    collisions = len(proposals.keys() & ava_proposals.keys())
    proposals.update(ava_proposals)

    # both are whole on the disk before either gets its name, and a run that ends in between is mended by the next
    parts = [work / path.name for path in (merged_csv, merged_pickle)]
    parts[0].write_text(''.join(line + '\n' for _, line in kinetics + ava))
    buffer = io.BytesIO()
    Pickler(buffer, protocol=4).dump(proposals)
    parts[1].write_bytes(buffer.getvalue() + MERGED)
    for path in own_csv, own_pickle:
        if path in (merged_csv, merged_pickle):  # about to be replaced
            shutil.copyfile(path, work / 'copy')
            os.replace(work / 'copy', original_of(path))
    for part, path in zip(parts, (merged_csv, merged_pickle)):
        os.replace(part, path)

    report = root / f'reports/merge_annotations_{args.split}.csv'
    write_report(report, ['video_id', 'timestamp', 'reason'], problems)
    keyframes = {(name[:11], int(line.split(',', 2)[1])) for name, line in kinetics + ava}
    bare = sum(f'{video},{second:04d}' not in proposals for video, second in keyframes)
    print(f'{len(kinetics) + len(ava)} rows in {merged_csv}: {len(kinetics)} of Kinetics, {len(ava)} of AVA')
    print(f'{len(proposals)} frames with proposals in {merged_pickle}: {len(proposals) - len(ava_proposals)} of '
          f"Kinetics, {len(ava_proposals)} of AVA{f' ({collisions} keys in both)' if collisions else ''}")
    print(f'  {bare} of {len(keyframes)} annotated keyframes have no proposal: training takes the whole frame there')
    if problems:
        print(f'  {len(problems)} rows or proposals left out: malformed')
    print(f'  report: {report}')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    root, notes = args.avakinetics_root, args.avakinetics_root / 'annotations'
    (rows_name, proposals_name), own_names, _ = FILES[args.split]
    copy_ava = f"copy AVA's annotation folder: cp -r {MMACTION2}/data/ava/annotations/ {root}/"
    for path, hint in ((root / rows_name, 'do Step 5 (prepare_annotation.py) or set --avakinetics_root'),
                       (root / proposals_name, 'do Step 6 (fetch_proposal.py) first'),
                       *((notes / name, copy_ava) for name in own_names)):
        if not path.is_file():
            sys.exit(f'error: {path} not found; {hint}')

    with workspace(notes / f'.merge_annotations_{args.split}') as work:
        merge(args, copy_ava, work)


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
