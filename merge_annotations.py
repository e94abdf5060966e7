#!/usr/bin/env python3
"""Step 7a: merge the Kinetics part into AVA's annotations.

Reads the csv of Step 5, the pickle of Step 6 and AVA's own files in ROOT/annotations. Replaces
AVA's ava_train_v2.2.csv and ava_dense_proposals_train.FAIR.recall_93.9.pkl with files of both
parts: rows of Kinetics, then of AVA. Backups of AVA's own are kept beside them as *.ava_only.*, so
that merging twice equals merging once. With --split val, AVA's files stay as they are, and
ava_kinetics_val_v2.2.csv and ava_kinetics_dense_proposals_val.pkl are written beside them.

    python3 merge_annotations.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import signal
import sys
from pathlib import Path
from typing import Iterable, NamedTuple

import numpy as np

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
MOVIE = r'[A-Za-z0-9_-]{11}'
CLIP = r'[A-Za-z0-9_-]{1,64}_[0-9]{6}_[0-9]{6}'
ROW_REST = r',\d+(,[-+.\de]+){4},\d+,-?\d+'  # timestamp, box, action, entity
# What a pickle of arrays names: types, and the functions that rebuild an array
ARRAY_PARTS = {
    'ndarray': np.ndarray,
    'dtype': np.dtype,
    'encode': codecs.encode,  # makes bytes, in pickles of protocol 2
    '_reconstruct': np.empty(0).__reduce__()[0],
    '_frombuffer': np.empty(0).__reduce_ex__(5)[0],
}


class Files(NamedTuple):
    """A csv of annotations and a pickle of proposals."""

    rows: Path
    proposals: Path


def to_path(text: str) -> Path:
    """Return the path that an argument names."""
    if not text:
        raise argparse.ArgumentTypeError('it is empty; set its variable as README says')
    return Path(text).expanduser()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step 7a: merge the Kinetics part into AVA's annotations."
    )
    parser.add_argument(
        '--avakinetics_root',
        type=to_path,
        default=MMACTION2 / 'data/ava_kinetics',
        metavar='DIR',
        help='folder of the data set (default: %(default)s)',
    )
    parser.add_argument(
        '--split',
        choices=['train', 'val'],
        default='train',
        help='part of AVA-Kinetics (default: train)',
    )
    args = parser.parse_args(argv)
    args.avakinetics_root = args.avakinetics_root.absolute()
    return args


def read_rows(path: Path, name: str) -> list[str]:
    """Read the rows `name,timestamp,x1,y1,x2,y2,action,entity`; `name` is a regular expression."""
    rows = path.read_text(errors='replace').splitlines()
    pattern = re.compile(name + ROW_REST, re.ASCII)
    for number, row in enumerate(rows, 1):
        if not pattern.fullmatch(row):
            sys.exit(f'error: line {number} of {path} is no annotation; make or copy it again')
    if not rows:
        sys.exit(f'error: {path} is empty; make or copy it again')
    return rows


class Unpickler(pickle.Unpickler):
    """Reads arrays and plain Python values only: a pickle that names more could run code.

    NumPy 1 and 2 keep the same functions in modules of different names.
    """

    def find_class(self, module, name):
        if module.split('.')[0] not in ('numpy', '_codecs') or name not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return ARRAY_PARTS[name]


class Pickler(pickle.Pickler):
    """Writes arrays so that NumPy 1.21 to 2.x can read them.

    Names numpy.ndarray, not a function of numpy._core, which NumPy 1 does not have.
    """

    def reducer_override(self, value):
        if type(value) is np.ndarray:  # an empty array of this shape and type, then what fills it
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


def read_proposals(path: Path) -> dict[str, np.ndarray]:
    """Read the proposals '<video id>,<timestamp:04d>' -> (n, 5) of a pickle, but no empty ones.

    MMAction2 takes the best score of a frame that has a key, and fails if there is none.
    """
    try:
        with open(path, 'rb') as file:
            return {key: boxes for key, boxes in Unpickler(file).load().items() if boxes.shape[0]}
    except Exception as error:  # damaged bytes may make pickle and NumPy raise anything
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        sys.exit(f'error: {path} is no pickle of proposals: {reason}'.rstrip())


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_record(path: Path) -> dict:
    """Read what a step recorded in reports/; return an empty dict if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # none, or edited by hand
        return {}


def check_datalist(kinetics: Files, digest: str, record: dict) -> None:
    """Exit if Step 6 recorded that it made the pickle, of this digest, from another csv."""
    is_recorded = record.get('proposals_sha256') == digest  # else the record is of another pickle
    if is_recorded and record.get('datalist_sha256') != digest_of(kinetics.rows.read_bytes()):
        reason = f'was made from another list than {kinetics.rows}; run Step 6 again with this list'
        sys.exit(f'error: {kinetics.proposals} {reason}')


def backup_path(path: Path) -> Path:
    return path.with_suffix(f'.ava_only{path.suffix}')


def find_ava(ava: Files, kinetics_keys: Iterable[str], copy_hint: str) -> Files:
    """Return AVA's own files: each of these or, if it holds Kinetics already, its backup."""
    names = set(re.findall('^[^,\n]+', ava.rows.read_text(errors='replace'), re.M))
    rows_merged = any(re.fullmatch(CLIP, name) for name in names)
    proposals_merged = rows_merged  # `merge` makes both backups before it writes
    if not rows_merged:  # the first run, or AVA's rows were copied again
        # both parts may have proposals on a video that AVA annotates
        keys = {key for key in kinetics_keys if key.split(',')[0] not in names}
        proposals_merged = not keys.isdisjoint(read_proposals(ava.proposals))
    own = []
    for path, merged in zip(ava, (rows_merged, proposals_merged)):
        if merged and not backup_path(path).is_file():
            reason = 'holds Kinetics already, and its backup is missing'
            sys.exit(f'error: {path} {reason}; {copy_hint}')
        own.append(backup_path(path) if merged else path)
    return Files(*own)


def write_if_changed(path: Path, content: bytes) -> None:
    """Write a file atomically; leave an equal one as it is."""
    part = path.with_suffix('.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        part.write_bytes(content)
        os.replace(part, path)


def lock_folder(path: Path) -> None:
    """Lock a folder until this process ends; exit if another run of this step has it."""
    try:
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit('error: another run of this step is at work; wait for it to end')
    except OSError:  # a file server without locks
        pass


def merge(kinetics: Files, ava: Files, merged: Files, reports: Path, split: str, hint: str) -> None:
    """Merge both parts, write the merged files and print the summary."""
    # read the part of Kinetics
    lock_folder(merged.rows.parent)
    digest = digest_of(kinetics.proposals.read_bytes())
    check_datalist(kinetics, digest, read_record(reports / f'fetch_proposal_{split}.json'))
    rows = read_rows(kinetics.rows, CLIP)
    kinetics_proposals = read_proposals(kinetics.proposals)

    # merge it with AVA's own files, whose place merged ones may have taken
    own = find_ava(ava, kinetics_proposals, hint)
    ava_rows = read_rows(own.rows, MOVIE)
    ava_proposals = read_proposals(own.proposals)
    proposals = kinetics_proposals | ava_proposals  # AVA's take precedence
    in_both = len(kinetics_proposals) + len(ava_proposals) - len(proposals)
    content = io.BytesIO()
    Pickler(content, protocol=4).dump(proposals)

    # back up AVA's own files if they are about to be replaced
    for path in own:
        if path in merged:  # a backup is not, nor are files of the validation split
            write_if_changed(backup_path(path), path.read_bytes())

    # write the merged files, and the record by which Step 7b recognizes them
    write_if_changed(merged.rows, ''.join(f'{row}\n' for row in rows + ava_rows).encode())
    write_if_changed(merged.proposals, content.getvalue())
    record = {
        'proposals_sha256': digest_of(content.getvalue()),
        'kinetics_proposals_sha256': digest,
    }
    write_if_changed(reports / f'merge_annotations_{split}.json', json.dumps(record).encode())
    print(
        f'rows in {merged.rows}: {len(rows) + len(ava_rows):,}, {len(rows):,} of Kinetics, '
        f'{len(ava_rows):,} of AVA'
    )
    print(
        f'frames with proposals in {merged.proposals}: {len(proposals):,}, '
        f'{len(proposals) - len(ava_proposals):,} of Kinetics, {len(ava_proposals):,} of AVA'
        + (f' (in both: {in_both:,})' if in_both else '')
    )


def explain_copy(annotations: Path, root: Path, has_ava: bool) -> str:
    """Say how to get AVA's annotations of version 2.2."""
    copy = f'cp -r {MMACTION2}/data/ava/annotations/ {root}/'
    hint = f"copy AVA's annotation folder of version 2.2: {copy}"
    if has_ava or not any(annotations.glob('ava_*_v2.1*')):
        return hint
    download = f'(cd {MMACTION2}/tools/data/ava && VERSION=2.2 bash download_annotations.sh)'
    return f"{annotations} holds version 2.1 of AVA's annotations; get 2.2: {download}; {hint}"


def merge_split(args: argparse.Namespace) -> None:
    """Check that the files of a split exist, then merge them."""
    root = args.avakinetics_root
    split = args.split
    annotations = root / 'annotations'
    infix = '' if split == 'train' else f'_{split}'
    kinetics = Files(root / f'kinetics_{split}.csv', root / f'kinetics{infix}_proposal.pkl')
    ava = merged = Files(
        annotations / f'ava_{split}_v2.2.csv',
        annotations / f'ava_dense_proposals_{split}.FAIR.recall_93.9.pkl',
    )
    if split == 'val':
        merged = Files(
            annotations / 'ava_kinetics_val_v2.2.csv',
            annotations / 'ava_kinetics_dense_proposals_val.pkl',
        )
    copy_hint = explain_copy(annotations, root, ava.rows.exists())
    for path, hint in (
        (kinetics.rows, 'run Step 5 (prepare_annotation.py) or set --avakinetics_root'),
        (kinetics.proposals, 'run Step 6 (fetch_proposal.py) first, with its default --picklepath'),
        (ava.rows, copy_hint),
        (ava.proposals, copy_hint),
    ):
        if not path.is_file():
            sys.exit(f'error: {path} not found; {hint}')
    if annotations.is_symlink() and split == 'train':
        reason = "merging would change AVA's own files; remove the link, then"
        sys.exit(f'error: {annotations} is a link to {annotations.resolve()}: {reason} {copy_hint}')
    merge(kinetics, ava, merged, root / 'reports', split, copy_hint)


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    try:
        merge_split(parse_args(argv))
        print(end='', flush=True)  # so that a closed pipe is noticed here
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
