#!/usr/bin/env python3
"""Step 7a: merge the Kinetics part into AVA's annotations.

Reads the csv of Step 5, the pickle of Step 6 and AVA's own files in ROOT/annotations. Replaces
AVA's ava_train_v2.2.csv and ava_dense_proposals_train.FAIR.recall_93.9.pkl by files that hold both
parts: rows of Kinetics, then of AVA. AVA's own are kept beside them as *.ava_only.*, so that
merging twice equals merging once. With --split val, AVA's files stay as they are, and
ava_kinetics_val_v2.2.csv and ava_kinetics_dense_proposals_val.pkl are written beside them.

    python3 merge_annotations.py --avakinetics_root=$MMACTION2/data/ava_kinetics
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import hashlib
import io
import os
import pickle
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

MMACTION2 = Path(os.environ.get('MMACTION2', '../../..'))
MERGED = re.compile(rb'\nmerged with [0-9a-f]{64}\n\Z')  # ends merged pickles, which is ignored
VIDEO = r'[A-Za-z0-9_-]{11}'
CLIP = rf'{VIDEO}_[0-9]{{6}}_[0-9]{{6}}'
ROW = r',\d+(,[-+.\de]+){4},\d+,-?\d+'  # second, box, action, entity
# What a pickle of arrays names: types, and the functions that rebuild an array
ARRAY_PARTS = {
    part.__name__: part
    for part in (
        np.ndarray,
        np.dtype,
        codecs.encode,
        np.empty(0).__reduce__()[0],
        np.empty(0).__reduce_ex__(5)[0],
    )
}


class Paths(NamedTuple):
    """A csv of annotations and a pickle of proposals."""

    rows: Path
    proposals: Path


def to_path(text: str) -> Path:
    """The path that an argument names."""
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
    return parser.parse_args(argv)


def read_rows(path: Path, name: str) -> list[str]:
    """The rows `name,second,x1,y1,x2,y2,action,entity` of a list of annotations."""
    rows, readable = path.read_text(errors='replace').splitlines(), re.compile(name + ROW, re.ASCII)
    for number, row in enumerate(rows, 1):
        if not readable.fullmatch(row):
            sys.exit(f'error: line {number} of {path} is no annotation; make it again')
    if not rows:
        sys.exit(f'error: {path} is empty; make it again')
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
    """Writes arrays so that NumPy 1.21 to 2.x can read them: by public names, `numpy._core` is
    unknown to NumPy 1.
    """

    def reducer_override(self, value):
        if type(value) is np.ndarray:
            return np.ndarray, (value.shape, value.dtype.str), value.__reduce__()[2]
        return NotImplemented


def read_proposals(path: Path) -> dict[str, np.ndarray]:
    """The proposals of a pickle, key '<video id>,<second:04d>' -> (n, 5), n not 0."""
    try:
        with open(path, 'rb') as file:
            return {key: boxes for key, boxes in Unpickler(file).load().items() if boxes.shape[0]}
    except Exception as error:  # damaged bytes may make pickle and NumPy raise anything
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        sys.exit(f'error: {path} is no pickle of proposals: {reason}'.rstrip())


def trailer_of(path: Path) -> bytes:
    """The last bytes of a pickle, where a trailer stands."""
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - 100))
        return file.read()


def check_list(kinetics: Paths) -> None:
    """Exit if the pickle's trailer says that Step 6 made it of another list."""
    made_of = re.search(rb'\nmade of ([0-9a-f]{64})\n\Z', trailer_of(kinetics.proposals))
    digest = hashlib.sha256(kinetics.rows.read_bytes()).hexdigest()
    if made_of and made_of[1].decode() != digest:
        reason = f'was made of another list than {kinetics.rows}; run Step 6 again with this list'
        sys.exit(f'error: {kinetics.proposals} {reason}')


def own_file(path: Path, merged: bool, copy_ava: str) -> Path:
    """AVA's own file: `path` or, if that is merged already, what the first merge kept beside it."""
    if merged and not kept_beside(path).is_file():
        reason = "holds Kinetics already, and AVA's own is not kept beside it"
        sys.exit(f'error: {path} {reason}; {copy_ava}')
    return kept_beside(path) if merged else path


def kept_beside(path: Path) -> Path:
    return path.with_suffix(f'.ava_only{path.suffix}')


def write(path: Path, content: bytes) -> None:
    """Write a file, which appears when it is complete; nothing changes if the content is equal."""
    part = path.with_suffix('.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        part.write_bytes(content)
        os.replace(part, path)


def merge(kinetics: Paths, ava: Paths, merged: Paths, copy_ava: str) -> None:
    """Join both parts, write the merged files, say what came of it."""
    try:  # until this process ends
        fcntl.flock(os.open(merged.rows.parent, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit('error: another run of this step is at work; wait for it to end')
    except OSError:  # of some file servers, which have no locks
        pass
    check_list(kinetics)
    rows_merged = bool(re.search(f'^{CLIP},'.encode(), ava.rows.read_bytes(), re.M))
    merged_before = rows_merged or MERGED.search(trailer_of(ava.proposals))
    own = Paths(
        own_file(ava.rows, rows_merged, copy_ava), own_file(ava.proposals, merged_before, copy_ava)
    )
    rows, ava_rows = read_rows(kinetics.rows, CLIP), read_rows(own.rows, VIDEO)
    proposals, ava_proposals = map(read_proposals, (kinetics.proposals, own.proposals))
    collisions = len(proposals.keys() & ava_proposals.keys())
    proposals.update(ava_proposals)  # AVA's win

    for path in own:
        if path in merged:  # AVA's own, about to be replaced
            write(kept_beside(path), path.read_bytes())
    write(merged.rows, ''.join(f'{row}\n' for row in rows + ava_rows).encode())
    content = io.BytesIO()
    Pickler(content, protocol=4).dump(proposals)
    digest = hashlib.sha256(kinetics.proposals.read_bytes()).hexdigest()
    content.write(f'\nmerged with {digest}\n'.encode())  # Step 7b compares it
    write(merged.proposals, content.getvalue())

    print(
        f'rows in {merged.rows}: {len(rows) + len(ava_rows):,}, {len(rows):,} of Kinetics, '
        f'{len(ava_rows):,} of AVA'
    )
    print(
        f'frames with proposals in {merged.proposals}: {len(proposals):,}, '
        f'{len(proposals) - len(ava_proposals):,} of Kinetics, {len(ava_proposals):,} of AVA'
        + (f' (in both: {collisions:,})' if collisions else '')
    )


def merge_split(args: argparse.Namespace) -> None:
    """Check that the files of a split exist, then merge them."""
    root, split = args.avakinetics_root.absolute(), args.split
    notes = root / 'annotations'
    part = '' if split == 'train' else f'_{split}'
    kinetics = Paths(root / f'kinetics_{split}.csv', root / f'kinetics{part}_proposal.pkl')
    name = f'ava_dense_proposals_{split}.FAIR.recall_93.9.pkl'
    ava = merged = Paths(notes / f'ava_{split}_v2.2.csv', notes / name)
    if split == 'val':
        name = 'ava_kinetics_dense_proposals_val.pkl'
        merged = Paths(notes / 'ava_kinetics_val_v2.2.csv', notes / name)
    copy_ava = f'cp -r {MMACTION2}/data/ava/annotations/ {root}/'
    copy_ava = f"copy AVA's annotation folder of version 2.2: {copy_ava}"
    if not ava.rows.exists() and any(notes.glob('ava_*_v2.1*')):
        download = f'(cd {MMACTION2}/tools/data/ava && VERSION=2.2 bash download_annotations.sh)'
        copy_ava = (
            f"{notes} holds version 2.1 of AVA's annotations; get 2.2: {download}; {copy_ava}"
        )
    hints = [
        'run Step 5 (prepare_annotation.py) or set --avakinetics_root',
        'run Step 6 (fetch_proposal.py) first, with its default --picklepath',
        copy_ava,
        copy_ava,
    ]
    for path, hint in zip([*kinetics, *ava], hints):
        if not path.is_file():
            sys.exit(f'error: {path} not found; {hint}')
    if notes.is_symlink() and split == 'train':
        reason = "merging would change AVA's own files; remove the link, then"
        sys.exit(f'error: {notes} is a link to {notes.resolve()}: {reason} {copy_ava}')
    merge(kinetics, ava, merged, copy_ava)


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how batch systems interrupt
    try:
        merge_split(parse_args(argv))
        print(end='', flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os._exit(141)
    except OSError as error:  # a full disk, missing permissions
        sys.exit(f'error: {error}; fix it, then run the same command again')
    except KeyboardInterrupt:
        print('interrupted; run the same command again', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
