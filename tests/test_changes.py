"""What changes between two runs: a product that is older than its input is made again, and what
cannot be mixed is refused.
"""

import json
import os
import shutil
import subprocess
import sys

import av
import cv2
import decord
import pytest

import cut_kinetics
import draw
import fetch_proposal
import softlink_ava
from helpers import (
    KEYFRAME,
    REPO,
    age,
    annotation_rows,
    clip_frames,
    cut,
    errors,
    here,
    numbered_source,
    prepare,
    read_report,
    run,
    snapshot,
)

CLIP = 'aaaaaaaaaaa_000103_000107'
NUM_FRAMES = 4 * draw.FPS  # of the clip


@pytest.fixture
def two_clips(world):
    """Two sources, one annotated keyframe each, cut: the folder."""
    for video in 'ab':
        numbered_source(world / f'kinetics700/videos/{video * 11}_000100_000110.mp4', {})
    (world / 'kinetics700/list.txt').write_text(
        ''.join(f'videos/{video * 11}_000100_000110.mp4\n' for video in 'ab')
    )
    (world / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').write_text(
        annotation_rows('aaaaaaaaaaa', 105) + annotation_rows('bbbbbbbbbbb', 105)
    )
    cut(world)
    age(world)
    return world


def file_of_keyframe(folder) -> str:
    """The file that Step 6 reads the keyframe of CLIP from."""
    keyframe = fetch_proposal.Keyframe(fetch_proposal.parse_clip(CLIP), 105)
    return fetch_proposal.find_frame(folder / 'root', keyframe).file


def report(folder, name='cut_kinetics_train') -> list[list[str]]:
    return read_report(folder / 'root', name)


def test_a_clip_older_than_its_source_is_cut_again(two_clips):
    numbered_source(
        two_clips / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4', dict(first=1000)
    )
    assert ': 1 new, 1 existing' in cut(two_clips).stdout
    assert clip_frames(two_clips / f'root/videos/{CLIP}.mp4')[0] == 1000 + 3 * draw.FPS
    before = snapshot(two_clips)
    assert ': 0 new, 2 existing' in cut(two_clips).stdout and snapshot(two_clips) == before


def test_a_source_that_is_gone_costs_no_clip(two_clips):
    (two_clips / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4').unlink()
    assert ': 0 new, 2 existing' in cut(two_clips).stdout and not report(two_clips)


def test_a_source_that_is_broken_now_costs_no_clip(two_clips):
    before = snapshot(two_clips / 'root/videos')
    (two_clips / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4').write_bytes(b'broken')
    done = cut(two_clips)
    assert '2 of 2 annotated keyframes' in done.stdout and 'older clip kept: 1' in done.stdout
    ((video, second, reason),) = report(two_clips)
    assert (video, second) == ('aaaaaaaaaaa', '105')
    assert reason.startswith('older clip kept: unreadable video: ')
    assert snapshot(two_clips / 'root/videos') == before


def test_clips_of_other_options_are_not_mixed(two_clips):
    before = snapshot(two_clips)
    assert errors(cut(two_clips, '--short_side=64', code=1)) == (
        f'error: the clips in {two_clips}/root/videos were made with short_side of the source; '
        'give the same options and install the same av, or move these clips away'
    )
    assert snapshot(two_clips) == before
    shutil.rmtree(two_clips / 'root/videos')
    assert ': 2 new' in cut(two_clips, '--short_side=64').stdout
    assert decord.VideoReader(str(two_clips / f'root/videos/{CLIP}.mp4'))[0].shape[:2] == (64, 86)
    assert 'were made with short_side 64; give' in errors(cut(two_clips, code=1))
    assert ': 0 new' in cut(two_clips, '--short_side=64').stdout


@pytest.mark.parametrize('name', ['short_side', 'av', 'fps', 'context_s', 'encoder'])
def test_clips_of_any_other_option_are_not_mixed(two_clips, name):
    record = two_clips / 'root/reports/cut_kinetics_options.json'
    options = json.loads(record.read_text())
    assert options['av'] == av.__version__
    record.write_text(json.dumps(options | {name: 'other'}))
    assert f'were made with {name} other; give' in errors(cut(two_clips, code=1))


@pytest.mark.parametrize(
    'name,value',
    [
        ('FPS', draw.FPS + 1),
        ('CONTEXT_S', 1),
        ('ENCODER', {}),
        ('SMALL', {}),
        ('LARGE', {}),
        ('LARGE_SIDE', 9),
    ],
)
def test_what_shapes_the_clips_is_recorded(two_clips, name, value, monkeypatch):
    monkeypatch.setattr(cut_kinetics, name, value)
    assert 'clips in ' in errors(cut(two_clips, code=1)) and 'were made with' in errors(
        cut(two_clips, code=1)
    )


def test_records_of_older_versions(two_clips):
    """A key that they lack had the default of today."""
    record = two_clips / 'root/reports/cut_kinetics_options.json'
    today = record.read_bytes()
    record.write_text(json.dumps(dict(short_side=None, av=av.__version__, clip_format=3)))
    assert ': 0 new, 2 existing' in cut(two_clips).stdout and record.read_bytes() == today


def test_clips_of_another_program_are_not_taken_as_ours(two_clips):
    (two_clips / 'root/reports/cut_kinetics_options.json').unlink()
    assert 'were not made by this script (there is no ' in errors(cut(two_clips, code=1))


def test_a_wrong_working_directory_leaves_nothing_behind(two_clips, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    done = run(
        'cut_kinetics.py',
        cwd=tmp_path / 'elsewhere',
        env={**os.environ, 'MMACTION2': 'data'},
        code=1,
    )
    assert 'run Step 2' in errors(done)
    run(
        'cut_kinetics.py',
        f'--avakinetics_anotation={two_clips}/ava_kinetics_v1_0',
        cwd=tmp_path / 'elsewhere',
        env={**os.environ, 'MMACTION2': '.'},
        code=1,
    )
    assert not list((tmp_path / 'elsewhere').iterdir())


def test_a_root_whose_name_is_no_utf8(two_clips):
    root = os.fsencode(two_clips) + b'/\xff\xfe'
    command = [
        sys.executable,
        REPO / 'cut_kinetics.py',
        f'--avakinetics_anotation={two_clips}/ava_kinetics_v1_0',
        f'--kinetics_list={two_clips}/kinetics700/list.txt',
        b'--avakinetics_root=' + root,
    ]
    for script, options in (
        ('cut_kinetics.py', command[2:]),
        ('extract_rgb_frames.py', command[4:]),
        ('prepare_annotation.py', [command[2], command[4]]),
    ):
        done = subprocess.run([sys.executable, REPO / script, *options], capture_output=True)
        assert done.returncode == 0 and b'Traceback' not in done.stderr, done.stderr
    assert len(os.listdir(root + b'/rawframes/' + CLIP.encode())) == NUM_FRAMES
    assert b'2 of 2 annotated keyframes' in done.stdout


@pytest.mark.parametrize('value', ['0', '-2'])
def test_a_number_of_workers_that_means_nothing_is_refused(two_clips, value):
    assert '--num_workers' in errors(cut(two_clips, f'--num_workers={value}', code=1))
    assert '--num_workers' in errors(
        here('extract_rgb_frames.py', f'--num_workers={value}', code=1)
    )


def extract(folder, *options):
    return here('extract_rgb_frames.py', f'--avakinetics_root={folder}/root', *options)


def test_frames_older_than_their_clip_are_extracted_again(two_clips):
    assert ': 2 new, 0 existing' in extract(two_clips).stdout
    age(two_clips)
    numbered_source(
        two_clips / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4', dict(first=1000)
    )
    cut(two_clips)
    assert ': 1 new, 1 existing' in extract(two_clips).stdout
    first = cv2.imread(str(two_clips / f'root/rawframes/{CLIP}/img_00001.jpg'))
    assert draw.read_stamp(first) == 1000 + 3 * draw.FPS
    before = snapshot(two_clips)
    assert ': 0 new, 2 existing' in extract(two_clips).stdout and snapshot(two_clips) == before


def test_a_folder_with_an_empty_frame_is_not_complete(two_clips):
    extract(two_clips)
    before = snapshot(two_clips)
    (two_clips / f'root/rawframes/{CLIP}/img_00077.jpg').write_bytes(b'')
    assert ': 1 new, 1 existing' in extract(two_clips).stdout and snapshot(two_clips) == before


@pytest.mark.parametrize('change', ['empty', 'too many'])
def test_folders_with_an_empty_frame_or_too_many(two_clips, change):
    """No step takes them. Too many are left when FPS is lowered."""
    extract(two_clips)
    folder = two_clips / f'root/rawframes/{CLIP}'
    keyframe = folder / KEYFRAME
    right = snapshot(folder)
    if change == 'empty':
        (folder / 'img_00077.jpg').write_bytes(b'')
        reason = f'frames missing or empty: 1 of {NUM_FRAMES}, first img_00077.jpg'
    else:
        shutil.copy(keyframe, folder / f'img_{NUM_FRAMES + 1:05d}.jpg')
        reason = f'too many frames: {NUM_FRAMES + 1}, not {NUM_FRAMES}'
        assert file_of_keyframe(two_clips) == f'videos/{CLIP}.mp4'
    assert 'clips: 1 with raw frames, 1 as videos' in prepare(two_clips).stdout
    clip = softlink_ava.parse_clip(CLIP)
    assert softlink_ava.check_clip(clip, True, two_clips / 'root').reason == reason
    assert ': 1 new, 1 existing' in extract(two_clips).stdout and snapshot(folder) == right
    assert file_of_keyframe(two_clips) == f'rawframes/{CLIP}/{keyframe.name}'


def test_step_5_takes_each_clip_as_it_is(two_clips):
    """By its raw frames where they are complete, else by its video; a folder of frames hides no
    other clip.
    """
    extract(two_clips)
    shutil.rmtree(two_clips / 'root/rawframes/bbbbbbbbbbb_000103_000107')
    done = prepare(two_clips)
    assert 'for 2 of 2 annotated keyframes\n  clips: 1 with raw frames, 1 as videos' in done.stdout
    assert 'training reads either all clips as frames or all as videos' in done.stdout
    (two_clips / f'root/rawframes/{CLIP}/img_00077.jpg').unlink()
    done = prepare(two_clips)
    assert '0 with raw frames, 2 as videos' in done.stdout and 'either' not in done.stdout
    (two_clips / f'root/videos/{CLIP}.mp4').unlink()
    prepare(two_clips)
    reason = f'frames missing or empty: 1 of {NUM_FRAMES}, first img_00077.jpg in {CLIP}'
    assert report(two_clips, 'prepare_annotation_train') == [['aaaaaaaaaaa', '105', reason]]


def test_frames_of_another_run_of_step_3_are_no_frames(two_clips):
    """Steps 5 and 6 read the videos then; without them Step 5 says why."""
    extract(two_clips)
    for name in os.listdir(two_clips / 'root/videos'):
        os.utime(two_clips / f'root/videos/{name}')
        for frame in (two_clips / f'root/rawframes/{name[:-4]}').iterdir():
            os.utime(frame, (0, 0))
    said = prepare(two_clips).stdout
    assert '0 with raw frames, 2 as videos' in said
    assert '  clips whose raw frames are older than the clip, as after cp -r: 2\n' in said
    command = f'python3 extract_rgb_frames.py --avakinetics_root={two_clips}/root'
    assert f'run Step 4, then this step again: {command}\n' in said
    assert file_of_keyframe(two_clips) == f'videos/{CLIP}.mp4'
    (two_clips / f'root/videos/{CLIP}.mp4').write_bytes(b'broken')
    said = prepare(two_clips).stdout
    assert '  1 skipped: unreadable clip\n' in said
    assert report(two_clips, 'prepare_annotation_train') == [
        [
            'aaaaaaaaaaa',
            '105',
            f'unreadable clip: Invalid data found when processing input in {CLIP}',
        ]
    ]


def test_validation_split_without_frames(two_clips):
    """Beside a training split that has them."""
    extract(two_clips)
    (two_clips / 'ava_kinetics_v1_0/kinetics_val_v1.0.csv').write_text(
        annotation_rows('vvvvvvvvvvv', 105)
    )
    numbered_source(two_clips / 'kinetics700/videos/vvvvvvvvvvv_000100_000110.mp4', {})
    (two_clips / 'kinetics700/val.txt').write_text('videos/vvvvvvvvvvv_000100_000110.mp4\n')
    cut(two_clips, '--split=val', f'--kinetics_list={two_clips}/kinetics700/val.txt')
    done = here(
        'prepare_annotation.py',
        f'--avakinetics_anotation={two_clips}/ava_kinetics_v1_0',
        f'--avakinetics_root={two_clips}/root',
        '--split=val',
    )
    assert 'for 1 of 1 annotated keyframes\n  clips: 0 with raw frames, 1 as videos' in done.stdout


def test_what_another_user_left_unfinished_is_no_obstacle(two_clips):
    """Colleagues share a folder by their group: what a killed run leaves is as open as the folder,
    whatever it is called.
    """
    old = os.umask(0o002)
    try:
        for folder, content in (
            ('videos/.cut_kinetics_train', 'x.mp4'),
            ('rawframes/.extract_rgb_frames', 'x'),
        ):
            (two_clips / 'root' / folder).mkdir(parents=True)
            (two_clips / 'root' / folder / content).mkdir() if content == 'x' else (
                two_clips / 'root' / folder / content
            ).touch()
        shutil.rmtree(two_clips / 'root/videos'), cut(two_clips), extract(two_clips)
    finally:
        os.umask(old)
    assert not [path for path in (two_clips / 'root').rglob('.*')]
    modes = {path.stat().st_mode & 0o777 for path in (two_clips / 'root/rawframes').iterdir()}
    assert (
        modes == {0o775} and (two_clips / f'root/videos/{CLIP}.mp4').stat().st_mode & 0o777 == 0o664
    )
