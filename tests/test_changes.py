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


@pytest.fixture
def job(world):
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


def report(folder, name='cut_kinetics_train') -> list[list[str]]:
    return read_report(folder / 'root', name)


def test_a_clip_older_than_its_source_is_cut_again(job):
    numbered_source(job / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4', dict(first=1000))
    assert ': 1 new, 1 existing' in cut(job).stdout
    assert clip_frames(job / f'root/videos/{CLIP}.mp4')[0] == 1090
    before = snapshot(job)
    assert ': 0 new, 2 existing' in cut(job).stdout and snapshot(job) == before


def test_a_source_that_is_gone_costs_no_clip(job):
    (job / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4').unlink()
    assert ': 0 new, 2 existing' in cut(job).stdout and not report(job)


def test_a_source_that_is_broken_now_costs_no_clip(job):
    before = snapshot(job / 'root/videos')
    (job / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4').write_bytes(b'broken')
    done = cut(job)
    assert '2 of 2 annotated keyframes' in done.stdout and 'older clip kept: 1' in done.stdout
    ((video, second, reason),) = report(job)
    assert (video, second) == ('aaaaaaaaaaa', '105')
    assert reason.startswith('older clip kept: unreadable video: ')
    assert snapshot(job / 'root/videos') == before


def test_clips_of_other_options_are_not_mixed(job):
    before = snapshot(job)
    assert errors(cut(job, '--short_side=64', code=1)) == (
        f'error: the clips in {job}/root/videos were made with short_side of the source; give '
        'the same options and install the same av, or move these clips away'
    )
    assert snapshot(job) == before
    shutil.rmtree(job / 'root/videos')
    assert ': 2 new' in cut(job, '--short_side=64').stdout
    assert decord.VideoReader(str(job / f'root/videos/{CLIP}.mp4'))[0].shape[:2] == (64, 86)
    assert 'were made with short_side 64; give' in errors(cut(job, code=1))
    assert ': 0 new' in cut(job, '--short_side=64').stdout


@pytest.mark.parametrize('name', ['short_side', 'av', 'fps', 'context_s', 'encoder'])
def test_clips_of_any_other_option_are_not_mixed(job, name):
    record = job / 'root/reports/cut_kinetics_options.json'
    options = json.loads(record.read_text())
    assert options['av'] == av.__version__
    record.write_text(json.dumps(options | {name: 'other'}))
    assert f'were made with {name} other; give' in errors(cut(job, code=1))


@pytest.mark.parametrize(
    'name,value',
    [
        ('FPS', 25),
        ('CONTEXT_S', 1),
        ('ENCODER', {}),
        ('SMALL', {}),
        ('LARGE', {}),
        ('LARGE_SIDE', 9),
    ],
)
def test_what_shapes_the_clips_is_recorded(job, name, value, monkeypatch):
    monkeypatch.setattr(cut_kinetics, name, value)
    assert 'clips in ' in errors(cut(job, code=1)) and 'were made with' in errors(cut(job, code=1))


def test_an_option_that_an_older_record_lacks_had_todays_default(job):
    record = job / 'root/reports/cut_kinetics_options.json'
    today = record.read_bytes()
    record.write_text(json.dumps(dict(short_side=None, av=av.__version__, clip_format=3)))
    assert ': 0 new, 2 existing' in cut(job).stdout and record.read_bytes() == today


def test_clips_of_another_program_are_not_taken_as_ours(job):
    (job / 'root/reports/cut_kinetics_options.json').unlink()
    assert 'were not made by this script (there is no ' in errors(cut(job, code=1))


def test_a_wrong_working_directory_leaves_nothing_behind(job, tmp_path):
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
        f'--avakinetics_anotation={job}/ava_kinetics_v1_0',
        cwd=tmp_path / 'elsewhere',
        env={**os.environ, 'MMACTION2': '.'},
        code=1,
    )
    assert not list((tmp_path / 'elsewhere').iterdir())


def test_a_root_whose_name_is_no_utf8(job):
    root = os.fsencode(job) + b'/\xff\xfe'
    command = [
        sys.executable,
        REPO / 'cut_kinetics.py',
        f'--avakinetics_anotation={job}/ava_kinetics_v1_0',
        f'--kinetics_list={job}/kinetics700/list.txt',
        b'--avakinetics_root=' + root,
    ]
    for script, options in (
        ('cut_kinetics.py', command[2:]),
        ('extract_rgb_frames.py', command[4:]),
        ('prepare_annotation.py', [command[2], command[4]]),
    ):
        done = subprocess.run([sys.executable, REPO / script, *options], capture_output=True)
        assert done.returncode == 0 and b'Traceback' not in done.stderr, done.stderr
    assert len(os.listdir(root + b'/rawframes/' + CLIP.encode())) == 120
    assert b'2 of 2 annotated keyframes' in done.stdout


@pytest.mark.parametrize('value', ['0', '-2'])
def test_a_number_of_workers_that_means_nothing_is_refused(job, value):
    assert '--num_workers' in errors(cut(job, f'--num_workers={value}', code=1))
    assert '--num_workers' in errors(
        here('extract_rgb_frames.py', f'--num_workers={value}', code=1)
    )


def extract(folder, *options):
    return here('extract_rgb_frames.py', f'--avakinetics_root={folder}/root', *options)


def test_frames_older_than_their_clip_are_extracted_again(job):
    assert ': 2 new, 0 existing' in extract(job).stdout
    age(job)
    numbered_source(job / 'kinetics700/videos/aaaaaaaaaaa_000100_000110.mp4', dict(first=1000))
    cut(job)
    assert ': 1 new, 1 existing' in extract(job).stdout
    assert draw.read_stamp(cv2.imread(str(job / f'root/rawframes/{CLIP}/img_00001.jpg'))) == 1090
    before = snapshot(job)
    assert ': 0 new, 2 existing' in extract(job).stdout and snapshot(job) == before


def test_a_folder_with_an_empty_frame_is_not_complete(job):
    extract(job)
    before = snapshot(job)
    (job / f'root/rawframes/{CLIP}/img_00077.jpg').write_bytes(b'')
    assert ': 1 new, 1 existing' in extract(job).stdout and snapshot(job) == before


@pytest.mark.parametrize('change', ['empty', 'too many'])
def test_no_step_takes_a_folder_with_an_empty_frame_or_too_many(job, change):
    """As frames of 30 a second are, once FPS is 25."""
    extract(job)
    folder = job / f'root/rawframes/{CLIP}'
    keyframe = folder / 'img_00061.jpg'
    right = snapshot(folder)
    if change == 'empty':
        (folder / 'img_00077.jpg').write_bytes(b'')
        reason = 'frames missing or empty: 1 of 120, first img_00077.jpg'
    else:
        shutil.copy(keyframe, folder / 'img_00121.jpg')
        reason = 'too many frames: 121, not 120'
        assert fetch_proposal.find_file(job / 'root', CLIP, 105)[0] == f'videos/{CLIP}.mp4'
    assert 'clips: 1 with raw frames, 1 as videos' in prepare(job).stdout
    assert softlink_ava.check_clip(CLIP, True, job / 'root').reason == reason
    assert ': 1 new, 1 existing' in extract(job).stdout and snapshot(folder) == right
    assert (
        fetch_proposal.find_file(job / 'root', CLIP, 105)[0] == f'rawframes/{CLIP}/{keyframe.name}'
    )


def test_step_5_takes_each_clip_as_it_is(job):
    """By its raw frames where they are complete, else by its video; a folder of frames hides no
    other clip.
    """
    extract(job)
    shutil.rmtree(job / 'root/rawframes/bbbbbbbbbbb_000103_000107')
    done = prepare(job)
    assert 'for 2 of 2 annotated keyframes; clips: 1 with raw frames, 1 as videos' in done.stdout
    assert 'training reads either all clips as frames or all as videos' in done.stdout
    (job / f'root/rawframes/{CLIP}/img_00077.jpg').unlink()
    done = prepare(job)
    assert '0 with raw frames, 2 as videos' in done.stdout and 'either' not in done.stdout
    (job / f'root/videos/{CLIP}.mp4').unlink()
    prepare(job)
    assert report(job, 'prepare_annotation_train') == [
        ['aaaaaaaaaaa', '105', f'frames missing or empty: 1 of 120, first img_00077.jpg in {CLIP}']
    ]


def test_frames_of_another_run_of_step_3_are_no_frames(job):
    """Steps 5 and 6 read the videos then; without them Step 5 says why."""
    extract(job)
    for name in os.listdir(job / 'root/videos'):
        os.utime(job / f'root/videos/{name}')
        for frame in (job / f'root/rawframes/{name[:-4]}').iterdir():
            os.utime(frame, (0, 0))
    said = prepare(job).stdout
    assert '0 with raw frames, 2 as videos' in said
    assert '  clips whose raw frames are older than the clip, as after cp -r: 2; training' in said
    command = f'python3 extract_rgb_frames.py --avakinetics_root={job}/root'
    assert f'run Step 4, then this step again: {command}\n' in said
    files = {fetch_proposal.find_file(job / 'root', CLIP, 105)[0]}
    assert files == {f'videos/{CLIP}.mp4'}
    (job / f'root/videos/{CLIP}.mp4').write_bytes(b'broken')
    said = prepare(job).stdout
    assert '  1 left out: unreadable clip\n' in said
    assert report(job, 'prepare_annotation_train') == [
        [
            'aaaaaaaaaaa',
            '105',
            f'unreadable clip: Invalid data found when processing input in {CLIP}',
        ]
    ]


def test_a_validation_split_without_frames_beside_a_training_split_with_them(job):
    extract(job)
    (job / 'ava_kinetics_v1_0/kinetics_val_v1.0.csv').write_text(
        annotation_rows('vvvvvvvvvvv', 105)
    )
    numbered_source(job / 'kinetics700/videos/vvvvvvvvvvv_000100_000110.mp4', {})
    (job / 'kinetics700/val.txt').write_text('videos/vvvvvvvvvvv_000100_000110.mp4\n')
    cut(job, '--split=val', f'--kinetics_list={job}/kinetics700/val.txt')
    done = here(
        'prepare_annotation.py',
        f'--avakinetics_anotation={job}/ava_kinetics_v1_0',
        f'--avakinetics_root={job}/root',
        '--split=val',
    )
    assert 'for 1 of 1 annotated keyframes; clips: 0 with raw frames, 1 as videos' in done.stdout


def test_what_another_user_left_unfinished_is_no_obstacle(job):
    """Colleagues share a folder by their group: what a killed run leaves is as open as the folder,
    whatever it is called.
    """
    old = os.umask(0o002)
    try:
        for folder, content in (
            ('videos/.cut_kinetics_train', 'x.mp4'),
            ('rawframes/.extract_rgb_frames', 'x'),
        ):
            (job / 'root' / folder).mkdir(parents=True)
            (job / 'root' / folder / content).mkdir() if content == 'x' else (
                job / 'root' / folder / content
            ).touch()
        shutil.rmtree(job / 'root/videos'), cut(job), extract(job)
    finally:
        os.umask(old)
    assert not [path for path in (job / 'root').rglob('.*')]
    modes = {path.stat().st_mode & 0o777 for path in (job / 'root/rawframes').iterdir()}
    assert modes == {0o775} and (job / f'root/videos/{CLIP}.mp4').stat().st_mode & 0o777 == 0o664
