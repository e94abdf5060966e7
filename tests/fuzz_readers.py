"""Fuzz the readers of annotations, lists, data lists and pickles with atheris: `python
tests/fuzz_readers.py SECONDS`.

Not part of the tests: pip install atheris. Every reader is given bytes that atheris makes up from
good examples; a reader may refuse them by what it documents, anything else is a find and ends the
run with the input in the working directory.
"""

import contextlib
import os
import pickle
import re
import resource
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
with atheris.instrument_imports(
    include=[
        'cut_kinetics',
        'prepare_annotation',
        'fetch_proposal',
        'merge_annotations',
        'softlink_ava',
    ]
):
    import cut_kinetics
    import fetch_proposal
    import merge_annotations
    import prepare_annotation
    import softlink_ava
import numpy as np  # noqa: E402

import sample_world  # noqa: E402

FOLDER = Path(tempfile.mkdtemp())
FILE = FOLDER / 'input'
LINE = b'aaaaaaaaaaa,5.005,0.1,0.2,0.5,0.9,12\n'
PROPOSALS = {'aaaaaaaaaaa,0005': np.ones((1, 5)), '-5KQ66BBWC4,0902': np.ones((2, 5))}
SEEDS = [
    b'\0' + LINE + b'bbbbbbbbbbb,7\n\xef\xbb\xbf"aaaaaaaaaaa","5"\r\n',
    b'\1a b/aaaaaaaaaaa_000000_000010.mp4 3\nx\n',
    b'\2aaaaaaaaaaa_000003_000007,5,0.1,0.2,0.5,0.9,12,-1\n',
    b'\3' + sample_world.fair_pickle(PROPOSALS),
    *(b'\3' + pickle.dumps(PROPOSALS, protocol) for protocol in range(6)),
    b'\4{"detector": "config", "score_thr": 0.7}\n'
    b'{"key": "aaaaaaaaaaa,0005", "file": "a", "size": 1, "mtime": 2, "people": [[0.1, 0.2, '
    b'0.5, 0.9, 0.8]]}',
]


def read_annotations(data: bytes) -> None:
    FILE.write_bytes(data)
    rows, problems = cut_kinetics.read_annotations(FILE)
    assert prepare_annotation.read_annotations(FILE) == (rows, problems)
    for video, second, _ in rows:
        assert len(video) == 11 and '/' not in video and '.' not in video and 0 <= second < 10**6


def read_list(data: bytes) -> None:
    FILE.write_bytes(data)
    keyframes = {'aaaaaaaaaaa': [5], 'bbbbbbbbbbb': [0, 7]}
    with contextlib.suppress(SystemExit):
        for source in cut_kinetics.read_list(FILE, keyframes)[0]:
            held = cut_kinetics.find_held(source, keyframes)
            start, end = cut_kinetics.clip_range(source, held)
            assert source.start <= start <= min(held) <= max(held) < end <= source.end


def read_datalist(data: bytes) -> None:
    FILE.write_bytes(data)
    with contextlib.suppress(SystemExit):
        keyframes, _ = fetch_proposal.read_datalist(FILE)
        for key, clip, second, *_ in fetch_proposal.plan_frames(keyframes, 1, Path()):
            assert key == f'{clip[:11]},{second:04d}'
            assert int(clip[12:18]) <= second < int(clip[19:25])
    with contextlib.suppress(SystemExit):
        rows = merge_annotations.read_rows(FILE, merge_annotations.CLIP, [])
        assert all(re.match(merge_annotations.CLIP + ',', row) for row in rows)
    softlink_ava.read_rows(FILE, [])


def read_proposals(data: bytes) -> None:
    FILE.write_bytes(data)
    with contextlib.suppress(SystemExit):
        for key, boxes in merge_annotations.read_proposals(FILE, []).items():
            assert isinstance(key, str) and boxes.dtype.kind == 'f' and np.isfinite(boxes).all()
    softlink_ava.read_proposals(FILE)


def read_detections(data: bytes) -> None:
    FILE.write_bytes(data)
    fetch_proposal.read_detections(FILE, 'config', 0.7)


READERS = read_annotations, read_list, read_datalist, read_proposals, read_detections


def forbidden(event: str, arguments: tuple) -> None:
    """Whatever a reader has no business to do ends the run at once."""
    if (
        event in ('os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'socket.connect')
        and ACTIVE
    ):
        os.write(2, f'{event} {arguments}\n'.encode())
        os.abort()


ACTIVE = []


def test_one_input(data: bytes) -> None:
    if data:
        ACTIVE.append(1)
        READERS[data[0] % len(READERS)](data[1:])
        ACTIVE.clear()


if __name__ == '__main__':
    seconds = sys.argv[1] if len(sys.argv) > 1 else '60'
    (FOLDER / 'corpus').mkdir()
    for number, seed in enumerate(SEEDS):
        (FOLDER / f'corpus/{number}').write_bytes(seed)
    # a pickle may number its objects up to 2^32, for which pickle takes up to 64 GB: the readers
    # then meet a MemoryError
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    sys.addaudithook(forbidden)
    atheris.Setup(
        [
            sys.argv[0],
            f'-max_total_time={seconds}',
            '-rss_limit_mb=0',
            '-timeout=20',
            '-print_final_stats=1',
            '-max_len=4000',
            str(FOLDER / 'corpus'),
        ],
        test_one_input,
    )
    atheris.Fuzz()
