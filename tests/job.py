"""A small data set before and after each step, for the tests that stop steps or run them elsewhere.

Eight videos of people who stand still, one more that is listed and missing, and two movies of AVA.
"""

import itertools
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

import draw
import sample_world
from helpers import REPO, TINY, annotation_rows, here, load, snapshot

VIDEOS, SIZE = 8, (320, 240)
AVA_VIDEOS = '-5KQ66BBWC4', 'AVA_mov-1_x'
A_CLIP = r'os.rename .*/videos/[^/]*\.mp4$'  # where hold/sitecustomize.py stops Step 3 at work
CUT = ['cut_kinetics.py', '--num_workers=2', '--avakinetics_anotation={job}']
STEPS = {
    'cut': [*CUT, '--kinetics_list={job}/list.txt'],
    'cut archives': [*CUT, '--kinetics_archives', '{job}/1.tar', '{job}/2.tar'],
    'extract': ['extract_rgb_frames.py', '--num_workers=2'],
    'prepare': ['prepare_annotation.py', '--avakinetics_anotation={job}'],
    'prepare from videos': ['prepare_annotation.py', '--avakinetics_anotation={job}'],
    # one frame at a time, since larger batches round otherwise
    'fetch': ['fetch_proposal.py', '--batch_size=1', '--neighbors=0', *TINY],
    'merge': ['merge_annotations.py'],
    'link': ['softlink_ava.py', '--ava_root={job}/ava'],
}


class Job:
    """The data set `before(step)`, and what an undisturbed run leaves, `after(step)`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def before(self, step: str) -> Path:
        return self.folder / f'before {step}'

    def after(self, step: str) -> Path:
        return self.folder / f'after {step}'

    def command(self, step: str, root: Path, *options: str) -> list[str]:
        script, *arguments = (argument.format(job=self.folder) for argument in STEPS[step])
        return [
            sys.executable,
            str(REPO / script),
            f'--avakinetics_root={root}',
            *arguments,
            *options,
        ]


def make_job(folder: Path) -> None:
    """Draw the sources, then run all steps; keep the data set before and after each."""
    draw_sources(folder)
    job, last = Job(folder), None
    for step in STEPS:
        before = job.before(step)
        if step.startswith('cut'):
            before.mkdir()
        elif step == 'prepare from videos':
            shutil.copytree(
                job.after('prepare'),
                before,
                ignore=lambda _, names: {'rawframes', 'kinetics_train.csv'} & set(names),
            )
        else:
            shutil.copytree(job.after(last), before, symlinks=True)
        if step == 'merge':
            shutil.copytree(folder / 'ava/annotations', before / 'annotations')
        shutil.copytree(before, job.after(step), symlinks=True)
        command = job.command(step, job.after(step))[1:]
        if step != 'fetch':
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
        else:
            here(*command)
            assert len(load(job.after(step) / 'kinetics_proposal.pkl')) == VIDEOS + 1
        # the step whose result the next one starts from
        last = {'cut archives': 'cut', 'prepare from videos': 'prepare'}.get(step, step)


def draw_sources(folder: Path) -> None:
    """Draw videos, their list, archives and annotations, and two movies of AVA."""
    lines = rows = ''
    for index in range(VIDEOS):
        path = f'a b (c)/{index:011d}_000000_000010.mp4'
        (folder / path).parent.mkdir(exist_ok=True)
        picture = draw.draw_frame(index, 0, SIZE)[0]
        draw.encode(folder / path, itertools.repeat(picture, 10 * draw.FPS), draw.FPS, SIZE)
        lines, rows = lines + f'{path} 1\n', rows + annotation_rows(f'{index:011d}', 5, 2)
        with tarfile.open(folder / f'{1 + index % 2}.tar', 'a') as tar:
            tar.add(folder / path, path)
    rows += annotation_rows('00000000000', 8) + annotation_rows(f'{VIDEOS:011d}', 5)
    (folder / 'list.txt').write_text(lines + f'{VIDEOS:011d}_000000_000010.mp4\n')
    (folder / 'kinetics_train_v1.0.csv').write_text(rows)
    annotations = folder / 'ava/annotations'
    annotations.mkdir(parents=True)
    for video in AVA_VIDEOS:
        (folder / 'ava/rawframes' / video).mkdir(parents=True)
        keyframe = 2 * draw.FPS  # of second 902; training asks for 40 frames before and 30 after
        for index in range(keyframe - 40, keyframe + 31):
            (folder / f'ava/rawframes/{video}/img_{index:05d}.jpg').write_bytes(b'frame')
    sample_world.draw_other_annotations(annotations, f'{AVA_VIDEOS[0]},0902')
    (annotations / 'ava_train_v2.2.csv').write_text(
        ''.join(f'{video},0902,0.1,0.2,0.3,0.4,12,0\n' for video in AVA_VIDEOS)
    )
    (annotations / 'ava_dense_proposals_train.FAIR.recall_93.9.pkl').write_bytes(
        sample_world.fair_pickle({f'{video},0902': np.ones((1, 5)) for video in AVA_VIDEOS})
    )


def products(root: Path) -> dict[str, str]:
    """Return all files but two logs, which tell of every run; without the path in the page."""
    files, page = snapshot(root), root / 'report.html'
    if page.exists():
        files['report.html'] = re.sub('<p>/.*?</p>', '', page.read_text())
    return {name: digest for name, digest in files.items() if not name.endswith('.jsonl')}


def assert_undisturbed(job: Job, step: str, root: Path) -> None:
    """Check that the tree is byte for byte that of an undisturbed run, with nothing unfinished."""
    found, right = products(root), products(job.after(step))
    assert {name for name in found | right if found.get(name) != right.get(name)} == set()
    names, expected = (
        {path.relative_to(top) for path in top.rglob('*')} for top in (root, job.after(step))
    )
    assert names - expected == set() and expected - names == set()
    assert not [name for name in names if name.name.startswith('.') or name.suffix == '.part']


def assert_whole(job: Job, step: str, root: Path) -> None:
    """Check that each file with a final name is as it was before, or as it should become."""
    whole, before = products(job.after(step)), products(job.before(step))
    for name, digest in products(root).items():
        if not any(part.startswith('.') for part in name.split('/')) and not name.endswith('.part'):
            known = whole.get(name), before.get(name)
            assert digest in known, name
