"""Step 4: as many frames as the name says, each the clip's own, at no lower quality than -q:v 2."""

import subprocess

import cv2
import decord
import numpy as np
import pytest

import draw
import extract_rgb_frames
from helpers import errors, here, numbered_source, read_csv, snapshot


def make_clip(root, name, seconds=2, **variant):
    path = root / 'videos' / f'{name}.mp4'
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered_source(path, dict(seconds=seconds, fps=draw.FPS, **variant))
    return path


@pytest.fixture
def root(tmp_path):
    root = tmp_path / 'my root, 100 %05d'  # what a pattern of ffmpeg's would stumble over
    make_clip(root, '-a_b-c_d-e__000010_000012')
    make_clip(root, 'Zz_00-AbCdE_000000_000002')
    return root


def test_frames_are_the_clips(root):
    done = here('extract_rgb_frames.py', f'--avakinetics_root={root}', '--num_workers=2')
    assert '2 new, 0 existing, 0 failed' in done.stdout
    for clip in '-a_b-c_d-e__000010_000012', 'Zz_00-AbCdE_000000_000002':
        frames = root / 'rawframes' / clip
        names = [f'img_{n:05d}.jpg' for n in range(1, 2 * draw.FPS + 1)]
        assert sorted(path.name for path in frames.iterdir()) == names
        shown = [draw.read_stamp(cv2.imread(str(frames / name))) for name in names]
        assert shown == list(range(2 * draw.FPS))
    assert read_csv(root / 'reports/extract_rgb_frames.csv') == [['clip', 'reason']]


def test_levels_of_video_become_those_of_jpeg():
    """Black, white and no colour stay so, each level in between the nearest one."""
    luma, *chroma = extract_rgb_frames.full_range_tables()
    assert [luma[level] for level in (0, 16, 126, 235, 255)] == [0, 0, 128, 255, 255]
    for table in chroma:
        assert [table[level] for level in (0, 16, 128, 240, 255)] == [0, 0, 128, 255, 255]


def test_quality_is_that_of_q2(root, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (draw.FPS, 60, 80, 3), dtype=np.uint8)
    frames = [cv2.resize(image, (320, 240), interpolation=cv2.INTER_CUBIC) for image in noise]
    clip = root / 'videos/QqQqQqQqQqQ_000000_000001.mp4'
    draw.encode(clip, frames, draw.FPS, (320, 240), options=['-crf', '10'])
    here('extract_rgb_frames.py', f'--avakinetics_root={root}')
    subprocess.run(
        [draw.FFMPEG, '-v', 'error', '-i', str(clip), '-q:v', '2', str(tmp_path / '%05d.jpg')],
        check=True,
    )
    psnr = [
        [
            cv2.PSNR(source.asnumpy()[..., ::-1], cv2.imread(str(folder / name.format(n))))
            for n, source in enumerate(decord.VideoReader(str(clip)), 1)
        ]
        for folder, name in (
            (root / 'rawframes' / clip.stem, 'img_{:05d}.jpg'),
            (tmp_path, '{:05d}.jpg'),
        )
    ]
    assert np.mean(psnr[0]) >= np.mean(psnr[1]) - 0.05, np.mean(psnr, 1)


def test_second_run(root):
    """It changes nothing, but extracts incomplete folders again."""
    here('extract_rgb_frames.py', f'--avakinetics_root={root}')
    before = snapshot(root)
    assert '0 new, 2 existing' in here('extract_rgb_frames.py', f'--avakinetics_root={root}').stdout
    assert snapshot(root) == before
    (root / 'rawframes/-a_b-c_d-e__000010_000012/img_00031.jpg').unlink()
    assert '1 new, 1 existing' in here('extract_rgb_frames.py', f'--avakinetics_root={root}').stdout
    assert snapshot(root) == before


def test_bad_clips_cost_themselves_only(root):
    make_clip(root, 'SHORT-SHORT_000000_000003')  # two seconds under a name of three
    (root / 'videos/EMPTY-EMPTY_000000_000002.mp4').touch()
    (root / 'videos/notes.txt').write_text('mine')
    done = here('extract_rgb_frames.py', f'--avakinetics_root={root}')
    assert '2 new, 0 existing, 2 failed' in done.stdout
    rows = dict(read_csv(root / 'reports/extract_rgb_frames.csv'))
    assert rows['SHORT-SHORT_000000_000003'] == (
        f'wrong number of frames: {2 * draw.FPS}, not {3 * draw.FPS}; '
        'remove the clip, then run Step 3 again'
    )
    assert rows['EMPTY-EMPTY_000000_000002'].startswith('unreadable clip: ')
    assert len(rows) == 3
    assert len(list((root / 'rawframes').iterdir())) == 2


def test_errors_say_what_to_do(tmp_path):
    assert 'run Step 3' in errors(
        here('extract_rgb_frames.py', f'--avakinetics_root={tmp_path}/none', code=1)
    )
    (tmp_path / 'bare/videos').mkdir(parents=True)
    assert 'run Step 3' in errors(
        here('extract_rgb_frames.py', f'--avakinetics_root={tmp_path}/bare', code=1)
    )
    (tmp_path / 'bare/videos/EMPTY-EMPTY_000000_000002.mp4').touch()
    assert 'no clip could' in errors(
        here('extract_rgb_frames.py', f'--avakinetics_root={tmp_path}/bare', code=1)
    )
