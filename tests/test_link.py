"""Step 7b: AVA's frames are linked, and ready means that training runs."""

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

import sample_world
import draw
import softlink_ava
from helpers import KEYFRAME, errors, fake_frames, here, numbered_source, read_report, run, snapshot

CLIP, MOVIES = 'aaaaaaaaaaa_000103_000107', ('-5KQ66BBWC4', 'AVA_mov-1_x')
NUM_FRAMES = 4 * draw.FPS  # of the clip
AVA_FRAME = f'img_{(1000 - 900) * draw.FPS:05d}.jpg'  # at the keyframe of both movies
LIST = 'annotations/ava_train_v2.2.csv'
PICKLE = 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl'
ROW = f'{CLIP},105,0.100,0.200,0.500,0.900,12,-1\n'
READY = 'ready for training\n'


def draw_movie(folder, seconds: range) -> None:
    """Frames, none a picture, of these seconds."""
    folder.mkdir(parents=True)
    for index in range((seconds.start - 900) * draw.FPS + 1, (seconds.stop - 900) * draw.FPS + 1):
        (folder / f'img_{index:05d}.jpg').write_bytes(b'frame')


@pytest.fixture(scope='module')
def merged(tmp_path_factory):
    """A folder with a merged ROOT of one Kinetics clip, and with AVA: two movies, some seconds of
    each.
    """
    folder = tmp_path_factory.mktemp('merged')
    root = folder / 'root'
    (root / 'annotations').mkdir(parents=True)
    sample_world.draw_other_annotations(root / 'annotations', f'{MOVIES[0]},1000')
    (root / LIST).write_text(''.join(f'{movie},1000,0.1,0.2,0.3,0.4,12,0\n' for movie in MOVIES))
    (root / PICKLE).write_bytes(sample_world.fair_pickle({}))
    (root / 'kinetics_train.csv').write_text(ROW)
    (root / 'kinetics_proposal.pkl').write_bytes(pickle.dumps({}))
    run('merge_annotations.py', f'--avakinetics_root={root}')
    fake_frames(root / 'rawframes', CLIP)
    for movie in MOVIES:
        draw_movie(folder / 'ava/rawframes' / movie, range(998, 1002))
    return folder


@pytest.fixture
def worlds(merged, tmp_path):
    """A copy of both folders."""
    shutil.copytree(merged, tmp_path, dirs_exist_ok=True)
    return tmp_path / 'root', tmp_path / 'ava'


def link(root, ava, **kwargs):
    return here('softlink_ava.py', f'--avakinetics_root={root}', f'--ava_root={ava}', **kwargs)


def test_links_are_absolute_and_a_second_run_changes_nothing(worlds, tmp_path):
    root, ava = worlds
    done = here('softlink_ava.py', '--avakinetics_root=root', '--ava_root=ava', cwd=tmp_path)
    assert os.readlink(root / 'rawframes/-5KQ66BBWC4') == f'{ava}/rawframes/-5KQ66BBWC4'
    assert '2 new' in done.stdout and done.stdout.endswith(READY)
    assert 'Training: Kinetics clips: 1, AVA movies: 2; all complete' in done.stdout
    assert 'AVA validation: Kinetics clips: 0, AVA movies: 1; all' in done.stdout
    before = snapshot(root)
    assert '0 new, 2 existing' in link(root, ava).stdout
    assert snapshot(root) == before


def test_wrong_links_are_mended_and_real_folders_left_alone(worlds, tmp_path):
    root, ava = worlds
    (root / 'rawframes/-5KQ66BBWC4').symlink_to(tmp_path / 'nowhere')
    draw_movie(root / 'rawframes/AVA_mov-1_x', range(998, 1002))
    done = link(root, ava)
    assert '1 new, 1 existing' in done.stdout
    assert os.readlink(root / 'rawframes/-5KQ66BBWC4') == f'{ava}/rawframes/-5KQ66BBWC4'
    assert not (root / 'rawframes/AVA_mov-1_x').is_symlink()


def asked_for(folder, second: int) -> set[int]:
    """The frames that MMAction2's loader asks for at any random offset, by the pipelines of its
    configs of AVA-Kinetics."""
    from mmaction.datasets import AVAKineticsDataset
    from mmaction.datasets.transforms import SampleAVAFrames
    from mmengine.registry import init_default_scope

    init_default_scope('mmaction')
    (folder / 'rows.csv').write_text(f'{MOVIES[0]},{second},0.1,0.2,0.3,0.4,12,0\n')
    (folder / 'labels.pbtxt').write_text('')
    data = AVAKineticsDataset(
        ann_file=str(folder / 'rows.csv'),
        exclude_file=None,
        label_file=str(folder / 'labels.pbtxt'),
        pipeline=[],
        data_prefix=dict(img=''),
    )
    frames = set()
    for length, interval in (4, 16), (8, 8), (16, 4), (32, 2):
        for offset in range(-interval // 2, (interval + 1) // 2):
            for test_mode in True, False:
                sampler = SampleAVAFrames(length, interval, test_mode=test_mode)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(np.random, 'randint', lambda *_, size: np.full(size, offset))
                    frames |= set(sampler.transform(data.get_data_info(0))['frame_inds'].tolist())
    return frames


@pytest.mark.parametrize('second', [900, 901, 1000, 1798, 1799, 1800])
def test_the_verdict_is_the_loaders(tmp_path, second):
    """Each frame around a keyframe is deleted in turn."""
    folder = tmp_path / 'rawframes' / MOVIES[0]
    folder.mkdir(parents=True)
    keyframe = (second - 900) * draw.FPS
    frames = range(max(0, keyframe - 60), keyframe + 61)
    for index in frames:
        (folder / f'img_{index:05d}.jpg').write_bytes(b'frame')
    table = pd.DataFrame(dict(clip=MOVIES[0], second=[second]))
    needed = asked_for(tmp_path, second)
    assert len(needed) >= 30 and not softlink_ava.check_all_frames([table], tmp_path)
    for index in frames:
        (folder / f'img_{index:05d}.jpg').rename(tmp_path / 'away')
        found = softlink_ava.check_all_frames([table], tmp_path)
        assert bool(found) == (index in needed), index
        (tmp_path / 'away').rename(folder / f'img_{index:05d}.jpg')


def make_old(root, ava):
    numbered_source(root / f'videos/{CLIP}.mp4', dict(seconds=4))
    for frame in (root / f'rawframes/{CLIP}').iterdir():
        os.utime(frame, (0, 0))


STEP_4 = 'run Step 4 again: python3 {repo}/extract_rgb_frames.py --avakinetics_root={root}'
STEP_7A = 'run Step 7a: python3 {repo}/merge_annotations.py --avakinetics_root={root} --split=train'
CASES = {  # what happens to the data set -> what the report says: name, reason, remedy
    'no validation file': (
        lambda root, ava: (root / 'annotations/ava_val_v2.2.csv').unlink(),
        (
            'ava_val_v2.2.csv',
            "unreadable annotations: [Errno 2] No such file or directory: '{root}/annotations/"
            "ava_val_v2.2.csv'",
            "copy it from AVA's annotation folder",
        ),
    ),
    'no proposals to validate with': (
        lambda root, ava: next((root / 'annotations').glob('ava_dense_proposals_val*')).unlink(),
        (
            'ava_dense_proposals_val.FAIR.recall_93.9.pkl',
            'unreadable proposals',
            "copy it from AVA's annotation folder",
        ),
    ),
    'other rows': (
        lambda root, ava: (root / 'kinetics_train.csv').write_text(ROW * 2),
        ('ava_train_v2.2.csv', 'other Kinetics rows than kinetics_train.csv', STEP_7A),
    ),
    'no list': (
        lambda root, ava: (root / 'kinetics_train.csv').unlink(),
        ('kinetics_train.csv', 'no annotations', 'run Step 5 (prepare_annotation.py)'),
    ),
    'not merged': (
        lambda root, ava: shutil.copy(root / LIST.replace('.csv', '.ava_only.csv'), root / LIST),
        ('ava_train_v2.2.csv', 'other Kinetics rows than kinetics_train.csv', STEP_7A),
    ),
    'other proposals': (
        lambda root, ava: (root / 'kinetics_proposal.pkl').write_bytes(pickle.dumps({1: 2})),
        (PICKLE.split('/')[1], 'other proposals than kinetics_proposal.pkl', STEP_7A),
    ),
    'pickle': (
        lambda root, ava: (root / PICKLE).write_bytes(b'broken'),
        (PICKLE.split('/')[1], 'unreadable proposals', STEP_7A),
    ),
    'empty frame': (
        lambda root, ava: (root / f'rawframes/{CLIP}/img_00007.jpg').write_bytes(b''),
        (CLIP, f'frames missing or empty: 1 of {NUM_FRAMES}, first img_00007.jpg', STEP_4),
    ),
    'missing frames': (
        lambda root, ava: [
            (root / f'rawframes/{CLIP}/img_{index:05d}.jpg').unlink() for index in (NUM_FRAMES, 99)
        ],
        (CLIP, f'frames missing or empty: 2 of {NUM_FRAMES}, first img_00099.jpg', STEP_4),
    ),
    'older frames': (make_old, (CLIP, 'frames older than their clip', STEP_4)),
    'frame of AVA': (
        lambda root, ava: (ava / f'rawframes/-5KQ66BBWC4/{AVA_FRAME}').unlink(),
        (
            'AVA -5KQ66BBWC4',
            f'frames missing or empty: 1 of 71, first {AVA_FRAME}',
            softlink_ava.EXTRACT_AGAIN,
        ),
    ),
    'no clip': (
        lambda root, ava: shutil.rmtree(root / f'rawframes/{CLIP}'),
        (
            CLIP,
            f'clip missing or broken: 0 of {NUM_FRAMES} frames',
            'remove it if it exists, then run Step 3 again (cut_kinetics.py)',
        ),
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_what_is_missing_is_named_with_what_mends_it(worlds, name):
    (root, ava), (change, (where, reason, remedy)) = worlds, CASES[name]
    assert link(root, ava).stdout.endswith(READY)
    change(root, ava)
    done = link(root, ava, code=1)
    reason = reason.format(root=root)
    remedy = remedy.format(repo=softlink_ava.__file__.rsplit('/', 1)[0], root=root)
    assert [where, reason, remedy] in read_report(root, 'softlink_ava')
    assert f'  {where}: {reason}; {remedy}\n' in done.stdout
    assert 'error: NOT ready for training: ' in errors(done)
    page = (root / 'report.html').read_text()
    assert 'NOT ready for training' in page and reason in page.replace('&#x27;', "'")


def test_frames_that_step_6_could_not_read(worlds):
    """They count as missing while they stay as they were."""
    root, ava = worlds
    frame = f'rawframes/{CLIP}/{KEYFRAME}'
    (root / 'reports').mkdir(exist_ok=True)
    record = root / 'reports/fetch_proposal_train.json'
    record.write_text(json.dumps(dict(unreadable={frame: (root / frame).stat().st_size})))
    message = errors(link(root, ava, code=1))
    remedy = 'unreadable frame; remove it, run Step 3 again, then Step 4: python3 '
    assert f'NOT ready for training: {frame}: {remedy}' in message
    assert remedy in (root / 'report.html').read_text()
    (root / frame).write_bytes(b'another frame')
    assert link(root, ava).stdout.endswith(READY)
    record.write_text(json.dumps(dict(unreadable={f'rawframes/{CLIP}/gone.jpg': 0})))
    assert link(root, ava).stdout.endswith(READY)


def test_warnings_of_step_6(worlds):
    """They are repeated here and on the page."""
    root, ava = worlds
    (root / 'reports').mkdir(exist_ok=True)
    record = root / 'reports/fetch_proposal_train.json'
    record.write_text(json.dumps(dict(warning='warning: proposals match 0.0%')))
    said = link(root, ava).stdout
    assert '  warning: proposals match 0.0%\n' in said and said.endswith(READY)
    assert '<li>warning: proposals match 0.0%</li>' in (root / 'report.html').read_text()


def test_a_pickle_of_another_list_needs_step_6_first(worlds):
    """Step 7a would refuse it, and say so."""
    root, ava = worlds
    digest = hashlib.sha256((root / 'kinetics_proposal.pkl').read_bytes()).hexdigest()
    record = {'proposals_sha256': digest, 'datalist_sha256': '0' * 64}
    (root / 'reports/fetch_proposal_train.json').write_text(json.dumps(record))
    message = errors(link(root, ava, code=1))
    assert (
        'kinetics_proposal.pkl: made from another list than kinetics_train.csv; run Step 6: '
        in message
    )
    assert f'--datalist={root}/kinetics_train.csv; then Step 7a' in message
    run('merge_annotations.py', f'--avakinetics_root={root}', code=1)


def test_a_data_set_of_version_1_is_accepted(worlds):
    """Its merged pickle ends with a line in place of the record."""
    root, ava = worlds
    digest = hashlib.sha256((root / 'kinetics_proposal.pkl').read_bytes()).hexdigest()
    with open(root / PICKLE, 'ab') as file:
        file.write(f'\nmerged with {digest}\n'.encode())
    (root / 'reports/merge_annotations_train.json').unlink()
    assert link(root, ava).stdout.endswith(READY)


@pytest.mark.parametrize('text', ['', 'x', '[1]', '3', '{"unreadable": {}}'])
def test_a_record_that_was_edited_counts_as_none(worlds, text):
    root, ava = worlds
    (root / 'reports/fetch_proposal_train.json').write_text(text)
    assert link(root, ava).stdout.endswith(READY)


def test_many_of_a_kind_are_one_line(worlds):
    root, ava = worlds
    for movie in MOVIES:
        (ava / f'rawframes/{movie}/{AVA_FRAME}').unlink()
    said = link(root, ava, code=1).stdout
    reason = f'frames missing or empty: 1 of 71, first {AVA_FRAME}'
    assert f'  2 items, such as AVA -5KQ66BBWC4: {reason};' in said


def test_suggested_commands_can_be_pasted(worlds, tmp_path):
    root, ava = worlds
    (tmp_path / 'a b (c)').mkdir()
    root = root.rename(tmp_path / "a b (c)/it's")
    shutil.copy(root / LIST.replace('.csv', '.ava_only.csv'), root / LIST)
    link(root, ava, code=1)
    ((_, _, remedy),) = read_report(root, 'softlink_ava')
    command = shlex.split(remedy.split(': ', 1)[1])
    assert command[0] == 'python3' and command[2] == f'--avakinetics_root={root}'
    subprocess.run(remedy.split(': ', 1)[1], shell=True, check=True, capture_output=True)
    assert link(root, ava).stdout.endswith(READY)


@pytest.mark.parametrize('seconds', [4, 3.5, 0])
def test_clips_that_are_read_as_videos_have_their_frames(worlds, seconds):
    root, ava = worlds
    shutil.rmtree(root / 'rawframes')
    clip = root / f'videos/{CLIP}.mp4'
    numbered_source(clip, dict(seconds=seconds or 1))
    if not seconds:
        clip.write_bytes(clip.read_bytes()[:500])
    if seconds == 4:
        verdict = 'ready for training from the videos of Kinetics, see docs/small-disk.md'
        said, page = link(root, ava).stdout, (root / 'report.html').read_text()
        assert said.endswith(f'{verdict}\n') and verdict in page
        hint = (
            'own configs read raw frames: for them, run Step 4, then Steps 5 to 7 again: python3 '
        )
        assert hint in said and hint in page
    else:
        reason = f'clip missing or broken: {round(seconds * draw.FPS)} of {NUM_FRAMES} frames'
        assert reason in errors(link(root, ava, code=1))


def test_the_kinetics_validation_part(worlds):
    """It is checked where it was prepared."""
    root, ava = worlds
    clip = 'bbbbbbbbbbb_000103_000107'
    (root / 'kinetics_val.csv').write_text(ROW.replace(CLIP, clip))
    (root / 'kinetics_val_proposal.pkl').write_bytes(pickle.dumps({}))
    fake_frames(root / 'rawframes', clip)
    assert 'Validation on' not in link(root, ava).stdout  # it is not merged yet
    run('merge_annotations.py', f'--avakinetics_root={root}', '--split=val')
    title, movies = 'Validation on AVA and Kinetics', 1
    said = link(root, ava).stdout
    assert f'{title}: Kinetics clips: 1, AVA movies: {movies}; all complete' in said
    assert said.endswith(READY) and f'<h2>{title}</h2>' in (root / 'report.html').read_text()
    (root / f'rawframes/{clip}/img_00001.jpg').unlink()
    done = link(root, ava, code=1)
    assert f'{title}: Kinetics clips: 1, AVA movies: {movies}; 1 incomplete' in done.stdout
    assert 'Training: Kinetics clips: 1, AVA movies: 2; all complete' in done.stdout


def test_the_page_says_how_the_data_set_was_made(worlds):
    root, ava = worlds
    options = dict(av='1.2.3', short_side=256)
    (root / 'reports').mkdir(exist_ok=True)
    (root / 'reports/cut_kinetics_options.json').write_text(json.dumps(options))
    options = dict(checkpoint='<x>.pth', score_thr=0.8, neighbors=1)
    (root / 'reports/fetch_proposal_train.json').write_text(json.dumps(options))
    link(root, ava)
    page = (root / 'report.html').read_text()
    cells = re.findall('<td>(.*?)</td>', page.split('How it was made')[1])
    assert cells[:6] == [
        'Step 3',
        'pixels of the short side',
        '256',
        'Step 3',
        'version of av',
        '1.2.3',
    ]
    assert cells[6:9] == ['Step 6, training', 'checkpoint', '&lt;x&gt;.pth']
    assert 'AVA-Kinetics: ready for training' in page and 'unreadable' not in page


def test_equal_data_gives_an_equal_page(worlds):
    root, ava = worlds
    link(root, ava)
    page = (root / 'report.html').read_bytes()
    for path in root.rglob('*.csv'):
        os.utime(path, (1e9, 1e9))
    link(root, ava)
    assert (root / 'report.html').read_bytes() == page


def test_keyframes_count_once(worlds):
    """At the first step that skipped them."""
    root, ava = worlds
    header, rows = 'video_id,timestamp,reason\n', 'a,5,file missing: x\nb,6,file missing: y\n'
    (root / 'reports').mkdir(exist_ok=True)
    (root / 'reports/cut_kinetics_train.csv').write_text(header + rows)
    rows = 'a,5,no clip\nb,6,no clip\nc,7,no clip\n,,malformed annotation: line 3: x\n' * 1
    (root / 'reports/prepare_annotation_train.csv').write_text(header + rows)
    assert softlink_ava.count_reasons(root / 'reports', 'train') == [
        ('Step 3', 'file missing', 2),
        ('Step 5', 'no clip', 1),
        ('Step 5', 'malformed annotation', 1),
    ]


def test_errors_say_what_to_do(worlds, tmp_path):
    root, ava = worlds
    assert 'set --ava_root' in errors(link(root, tmp_path / 'none', code=1))
    assert "is the data set's own folder" in errors(link(root, root, code=1))
    (tmp_path / 'bare/rawframes').mkdir(parents=True)
    assert 'holds no folder' in errors(link(root, tmp_path / 'bare', code=1))
    assert 'run Step 7a' in errors(link(tmp_path / 'bare', ava, code=1))
    (root / LIST).write_text(ROW + 'no row\n')
    assert 'unreadable annotations: ' in errors(link(root, ava, code=1))
    (root / LIST).unlink()
    message = errors(link(root, ava, code=1))
    assert re.search(r'run Step 7a: python3 \S+merge_annotations.py --avakinetics_root=', message)
