"""The README's commands as they stand there, on a drawn world; MMAction2's own data set reads the
result.
"""

import os
import subprocess

import cv2
import numpy as np
import pytest

import demo
import draw
import sample_world
from helpers import here, load, overlap, read_report, snapshot

# clip_len x frame_interval of MMAction2's AVA-Kinetics configs
WINDOWS = [(4, 16), (8, 8), (16, 4)]


def test_readme_commands_make_the_data_set(mmaction2):
    root, said = mmaction2.root, mmaction2.notes['first']
    assert 'Traceback' not in said and 'Warning' not in said
    assert (
        ': 10 new, 0 existing; they cover' in said
        and '11 of 13 annotated keyframes' in said
        and 'ready for training' in said
    )
    assert {tuple(row[:2]) for row in read_report(root, 'cut_kinetics_train')} == {
        ('bRoKeN-off_', '25'),
        ('gOnE-gOnE-1', '25'),
    }
    assert 100_000 < (root / 'report.html').stat().st_size < 4_000_000
    assert said.count(' annotated boxes: ') == 1  # after Step 6, not after Step 7


def test_readme_commands_again_change_nothing(mmaction2):
    """Though copying AVA's annotations again is one of them."""
    assert any('cp -r' in commands for commands in demo.readme_commands('### Step [3-7]'))
    assert mmaction2.notes['after again'] == mmaction2.notes['after first']
    said = mmaction2.notes['again']
    assert said.count(': 0 new,') == 3 and 'frames to detect: 0' in said


def test_the_list_of_step_1_is_one_find_away(mmaction2, tmp_path):
    """With paths such as ./class/video.mp4, and no label."""
    listed = dict(MMACTION2=str(mmaction2.path), KINETICS_LIST=f'{tmp_path}/list.txt')
    command = demo.readme_commands('### Step 1')[0]
    subprocess.run(command, shell=True, check=True, env=os.environ | listed)
    notes = mmaction2.path / 'tools/data/ava_kinetics/ava_kinetics_v1_0'
    options = f'--avakinetics_anotation={notes}', f'--avakinetics_root={tmp_path}/root'
    folder = mmaction2.path / 'data/kinetics700/videos_train'
    here('cut_kinetics.py', *options, f'--kinetics_list={tmp_path}/list.txt', cwd=folder)
    cut = snapshot(tmp_path / 'root/videos')
    assert len(cut) == 10 and cut.items() <= snapshot(mmaction2.root / 'videos').items()


def dataset(root, clip_len, frame_interval, test_mode):
    from mmaction.datasets import AVAKineticsDataset
    from mmengine.registry import init_default_scope

    init_default_scope('mmaction')
    notes = root / 'annotations'
    return AVAKineticsDataset(
        ann_file=str(notes / 'ava_train_v2.2.csv'),
        exclude_file=str(notes / 'ava_train_excluded_timestamps_v2.2.csv'),
        label_file=str(notes / 'ava_action_list_v2.2_for_activitynet_2019.pbtxt'),
        proposal_file=str(notes / 'ava_dense_proposals_train.FAIR.recall_93.9.pkl'),
        data_prefix=dict(img=str(root / 'rawframes')),
        test_mode=test_mode,
        pipeline=[
            dict(
                type='SampleAVAFrames',
                clip_len=clip_len,
                frame_interval=frame_interval,
                test_mode=test_mode,
            ),
            dict(type='RawFrameDecode', io_backend='disk'),
        ],
    )


@pytest.mark.parametrize('clip_len,frame_interval', WINDOWS)
@pytest.mark.parametrize('test_mode', [False, True])
def test_mmaction2_reads_every_record(mmaction2, clip_len, frame_interval, test_mode):
    data = dataset(mmaction2.root, clip_len, frame_interval, test_mode)
    assert len(data) == 11 + 2 * 3 - 1  # Kinetics keyframes and AVA's, of which one is excluded
    scenes = {
        video: (number, start, size)
        for number, (video, start, _, size, _) in enumerate(
            (video for videos in sample_world.SCENES.values() for video in videos), 1
        )
    }
    for index in range(len(data)):
        record = data[index]
        assert len(record['imgs']) == clip_len
        video = record['video_id']
        if len(video) == 11:
            boxes = draw.figure_boxes(
                sample_world.AVA_VIDEOS[video], record['timestamp'] - 900, sample_world.AVA_SIZE
            )
        else:
            scene, start, size = scenes[video[:11]]
            boxes = draw.figure_boxes(scene, record['timestamp'] - start, size)
        height, width = record['imgs'][0].shape[:2]  # decoding has made the boxes pixels
        np.testing.assert_allclose(
            record['gt_bboxes'] / [width, height, width, height], boxes, atol=0.001
        )
        assert record['proposals'].shape[1] == 4 and len(record['proposals']) == len(boxes)
        assert record['gt_labels'][:, 12].all()


def test_the_window_shows_the_right_moment(mmaction2):
    """The frame in the middle of MMAction2's window is the source's nearest to the keyframe less
    its 1/30 s.
    """
    rates = {
        video: fps for videos in sample_world.SCENES.values() for video, _, fps, _, _ in videos
    }
    starts = {
        video: start for videos in sample_world.SCENES.values() for video, start, *_ in videos
    }
    data = dataset(mmaction2.root, 8, 8, True)
    seen = 0
    for index in range(len(data)):
        record = data[index]
        video = record['video_id'][:11]
        if video not in starts:
            continue
        rate = float(sample_world.Fraction(rates[video]))
        due = max(record['timestamp'] - starts[video] - 1 / draw.FPS, 0)
        number = draw.read_stamp(cv2.cvtColor(record['imgs'][4], cv2.COLOR_RGB2BGR))
        assert abs(number / rate - due) <= 0.5 / min(rate, draw.FPS) + 1e-6, video
        seen += 1
    assert seen == 11


def test_proposals_of_the_sample_are_real_detections(mmaction2):
    proposals = load(mmaction2.root / 'kinetics_proposal.pkl')
    scene = good = total = 0
    for videos in sample_world.SCENES.values():
        for video, start, _, size, seconds in videos:
            scene += 1
            for second in seconds:
                people = draw.figure_boxes(scene, second - start, size)
                found = proposals[f'{video},{second:04d}']
                good += (
                    len(found) == len(people) and (overlap(people, found[:, :4]).max(1) > 0.7).all()
                )
                total += 1
    assert total == 11 and good >= 0.95 * total


def test_every_script_stands_in_its_documented_place(mmaction2):
    place = mmaction2.path / 'tools/data/ava_kinetics'
    assert all((place / script).is_file() for script in demo.SCRIPTS)
    assert not list(place.glob('*.part'))
