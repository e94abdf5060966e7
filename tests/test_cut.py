"""Step 3 on sources of every kind: each frame of each clip is the nearest one of the source."""
import os
import subprocess
from pathlib import Path

import decord
import pytest

import draw
from conftest import (SIZE, VARIANTS, annotation_rows, errors, number_times, numbered_source, read_csv, run, snapshot)

# Kinetics-700 class names, with what shells and splitting at spaces stumble over
CLASSES = ["massaging person's head", 'curling (sport)', 'passing American football (not in game)', 'zumba',
           'a; touch pwned', 'quote "this"', '$(touch pwned)', '-dash', 'per%cent %05d', 'ünïcode']
START = 100  # seconds of the original at which every source starts


def clip_frames(path: Path) -> list[int]:
    return [draw.read_stamp(frame.asnumpy()[..., ::-1]) for frame in decord.VideoReader(str(path))]


def video_id(index: int) -> str:
    return ('-{:02d}_x_AbCdE' if index % 2 else 'Zz_{:02d}-AbCdE')[:15].format(index)[:11]


@pytest.fixture(scope='module')
def matrix(tmp_path_factory):
    """All variants as one Kinetics-700 folder, cut by one command: the folder and the command's output."""
    folder = tmp_path_factory.mktemp('matrix')
    lines, rows = [], ''
    for index, variant in enumerate(VARIANTS.values()):
        path = '{}/{}_{:06d}_{:06d}.{}'.format(CLASSES[index % len(CLASSES)], video_id(index), START, START + 10,
                                               variant.get('suffix', 'mp4'))
        numbered_source(folder / 'kinetics700/videos_train' / path, variant)
        lines.append(path + ('' if index % 3 == 0 else f' {index}'))
        # the 3rd, the 6th and the 9th second in turn, so that clips touch the source's start, its middle and its end
        rows += annotation_rows(video_id(index), START + (3, 6, 9)[index % 3] + 0.01, 2)
    (folder / 'kinetics700/list.txt').write_text('\n'.join(lines) + '\n')
    (folder / 'ava_kinetics_v1_0').mkdir()
    (folder / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').write_text(rows)
    return folder, cut(folder)


def cut(folder, *options, **kwargs):
    return run('cut_kinetics.py', f'--avakinetics_anotation={folder}/ava_kinetics_v1_0',
               f'--kinetics_list={folder}/kinetics700/list.txt', f'--avakinetics_root={folder}/root', *options,
               cwd=folder, **kwargs)


def test_no_keyframe_is_lost(matrix):
    folder, done = matrix
    assert len(list((folder / 'root/videos').iterdir())) == len(VARIANTS)
    assert read_csv(folder / 'root/reports/cut_kinetics_train.csv') == [['video_id', 'timestamp', 'reason']]
    assert f'{len(VARIANTS)} of {len(VARIANTS)} annotated keyframes' in done.stdout
    assert not list(folder.rglob('pwned'))


@pytest.mark.parametrize('index,name', list(enumerate(VARIANTS)), ids=list(VARIANTS))
def test_every_frame_is_the_nearest(matrix, index, name):
    variant = VARIANTS[name]
    keyframe = START + (3, 6, 9)[index % 3]
    start, end = max(START, keyframe - 2), min(START + 10, keyframe + 2)
    path = matrix[0] / f'root/videos/{video_id(index)}_{start:06d}_{end:06d}.mp4'
    reader = decord.VideoReader(str(path))
    assert reader.get_avg_fps() == 30
    assert reader[0].shape[:2] == tuple(side // 2 * 2 for side in variant.get('size', SIZE)[::-1])
    numbers, times = clip_frames(path), number_times(variant)
    assert len(numbers) == (end - start) * 30
    for k, number in enumerate(numbers):
        due = start - START + k / 30
        nearest = min(abs(time - due) for time in times.values())
        assert abs(times[number] - due) <= nearest + 0.0011, f'frame {k} shows {number}'  # mkv counts milliseconds
    if not variant.get('drop'):
        from fractions import Fraction
        due = keyframe - START
        slower = min(30, Fraction(variant.get('fps', 30)))
        assert abs(times[numbers[(keyframe - start) * 30]] - due) <= 0.5 / slower + 1e-6


def test_clips_are_what_training_expects(matrix):
    for path in (matrix[0] / 'root/videos').iterdir():
        said = subprocess.run([draw.FFMPEG, '-i', str(path)], capture_output=True, text=True).stderr
        assert 'Video: h264' in said and 'yuv420p' in said and 'Audio' not in said and 'rotation' not in said


def test_second_run_changes_nothing(matrix):
    folder, _ = matrix
    before = snapshot(folder)
    done = cut(folder)
    assert f'0 cut now, {len(VARIANTS)} there already' in done.stdout
    assert snapshot(folder) == before


def test_overwrite_gives_the_same_bytes(matrix):
    folder, _ = matrix
    before, victim = snapshot(folder), sorted((folder / 'root/videos').iterdir())[0]
    victim.write_bytes(b'spoilt')
    cut(folder, '--overwrite')
    assert snapshot(folder) == before
