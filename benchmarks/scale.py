"""A second run over finished work, and Step 5, at sizes up to that of the real data set.

    python benchmarks/scale.py FOLDER [CLIPS ...]

FOLDER is emptied; its disk needs room for 12 million names. Sources and clips are empty files, the
120 frames of a clip hard links to files of one byte. Prints seconds and the main process's memory
of Step 3 and Step 4 (all there already), of Step 5, of MMAction2's own Step 5, which counts the
files of each folder, and of Step 7.
"""

import importlib.util
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).parent.parent
THEIRS = Path(importlib.util.find_spec('mmaction').origin).parent / '.mim/tools/data/ava_kinetics'
LINKS = 60_000  # names that one file may have; ext4 allows 65,000


def cut_again(folder: Path) -> list[str]:
    return [
        str(REPO / 'cut_kinetics.py'),
        f'--avakinetics_anotation={folder}',
        f'--kinetics_list={folder}/list.txt',
        f'--avakinetics_root={folder}/root',
    ]


def make(folder: Path, clips: int) -> None:
    """Make a finished data set of so many clips, with 235 movies of AVA for 100,000."""
    root, ava = folder / 'root', folder / 'ava'
    for path in root / 'videos', root / 'rawframes', root / 'annotations', ava / 'rawframes':
        path.mkdir(parents=True)
    movies = [f'movie_{index:05d}' for index in range(max(1, clips * 235 // 100_000))]
    names = [f'{index:011d}' for index in range(clips)]
    (folder / 'list.txt').write_text(
        ''.join(f'class/{name}_000000_000010.mp4 1\n' for name in names)
    )
    (folder / 'kinetics_train_v1.0.csv').write_text(
        ''.join(
            f'{name},5.0,0.1,0.1,0.5,0.9,{action}\n'
            for name in names
            for action in (11, 12, 79, 80)
        )
    )
    proposals = {
        f'{name},{second:04d}': np.full((2, 5), 0.9) for name in names for second in (4, 5, 6)
    }
    (root / 'kinetics_proposal.pkl').write_bytes(pickle.dumps(proposals))
    rows = (
        f'{movie},{second:04d},0.1,0.1,0.5,0.9,12,0\n'
        for movie in movies
        for second in range(902, 1799)
    )
    (root / 'annotations/ava_train_v2.2.csv').write_text(''.join(rows))
    for name in (
        'ava_action_list_v2.2_for_activitynet_2019.pbtxt',
        'ava_train_excluded_timestamps_v2.2.csv',
        'ava_val_v2.2.csv',
        'ava_val_excluded_timestamps_v2.2.csv',
        'ava_dense_proposals_val.FAIR.recall_93.9.pkl',
    ):
        (root / 'annotations' / name).touch()
    (root / 'annotations/ava_val_v2.2.csv').write_text(f'{movies[0]},0902,0.1,0.1,0.5,0.9,12,0\n')
    validated = root / 'annotations/ava_dense_proposals_val.FAIR.recall_93.9.pkl'
    validated.write_bytes(pickle.dumps({}))
    (root / 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl').write_bytes(
        pickle.dumps({f'{movies[0]},0902': np.full((1, 5), 0.9)})
    )
    # nothing is there to cut yet, but Step 3 notes the options of the clips that are about to come
    subprocess.run(
        [sys.executable, *cut_again(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    (folder / 'class').mkdir()
    made = itertools.count()

    def link(folder: Path, count: int) -> None:
        folder.mkdir()
        for frame in range(1, count + 1):
            number = next(made)
            source = ava.parent / f'frame_{number // LINKS}'
            if number % LINKS == 0:
                source.write_text('x')
            os.link(source, folder / f'img_{frame:05d}.jpg')

    for movie in movies:
        link(ava / 'rawframes' / movie, 27_000)
    for name in names:
        for video in (
            folder / f'class/{name}_000000_000010.mp4',
            root / f'videos/{name}_000003_000007.mp4',
        ):
            video.touch()
            os.utime(video, (0, 0))  # older than the frames, of which the first is made first
        link(root / f'rawframes/{name}_000003_000007', 120)


def run(*command) -> tuple[float, float]:
    """Run a command; return seconds and the main process's peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    columns = 'Step 3 again', 'Step 4 again', 'Step 5', "MMAction2's", 'merge', 'link, check'
    print(f'{"clips":>8}' + ''.join(f'{column:>18}' for column in columns))
    for clips in map(int, sys.argv[2:] or (1_000, 10_000, 30_000, 100_000)):
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, clips)
        notes, root = f'--avakinetics_anotation={folder}', f'--avakinetics_root={folder}/root'
        results = [
            run(*cut_again(folder)),
            run(REPO / 'extract_rgb_frames.py', root),
            run(REPO / 'prepare_annotation.py', notes, root),
            run(THEIRS / 'prepare_annotation.py', notes, root),
            run(REPO / 'merge_annotations.py', root),
            run(REPO / 'softlink_ava.py', root, f'--ava_root={folder}/ava'),
        ]
        print(
            f'{clips:>8,}'
            + ''.join(f'{f"{seconds:.2f} s {memory:.0f} MB":>18}' for seconds, memory in results),
            flush=True,
        )
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
