"""Step 5: the csv that MMAction2 reads, from clip folders of any origin."""

import pytest

import draw
from helpers import annotation_rows, errors, fake_frames, prepare, read_csv, read_report, snapshot


def annotate(world, text):
    (world / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').write_bytes(
        text.encode() if isinstance(text, str) else text
    )


def reasons(world):
    return {
        (row[0], row[1]): row[2] for row in read_report(world / 'root', 'prepare_annotation_train')
    }


def test_rows_are_mmaction2s_in_the_order_of_the_annotations(world):
    fake_frames(world / 'root/rawframes', '-b_b_b_b_b__000003_000007')
    fake_frames(world / 'root/rawframes', 'aaaaaaaaaaa_000100_000104')
    annotate(
        world,
        '-b_b_b_b_b_,5.005000,0.12345,0.2,0.98765,1.0,12\n'
        + annotation_rows('aaaaaaaaaaa', 102.9, 2)
        + annotation_rows('aaaaaaaaaaa', 103, 0)
        + '-b_b_b_b_b_,5.005000,0,0.2,0.98765,1.0,80\n',
    )
    done = prepare(world)
    assert (world / 'root/kinetics_train.csv').read_text() == (
        '-b_b_b_b_b__000003_000007,5,0.123,0.200,0.988,1.000,12,-1\n'
        'aaaaaaaaaaa_000100_000104,102,0.100,0.200,0.500,0.900,12,-1\n'
        'aaaaaaaaaaa_000100_000104,102,0.110,0.200,0.500,0.900,13,-1\n'
        '-b_b_b_b_b__000003_000007,5,0.000,0.200,0.988,1.000,80,-1\n'
    )
    assert 'kinetics_train.csv: 4, for 2 of 2 annotated keyframes\n  clips: 2 with' in done.stdout
    assert 'keyframes without people, nothing to prepare: 1' in done.stdout and not reasons(world)


def test_the_most_centred_whole_clip_is_taken(world):
    for clip in (
        'aaaaaaaaaaa_000100_000110',
        'aaaaaaaaaaa_000103_000107',
        'aaaaaaaaaaa_000105_000107',
    ):
        fake_frames(world / 'root/rawframes', clip)
    annotate(world, annotation_rows('aaaaaaaaaaa', 105) + annotation_rows('aaaaaaaaaaa', 101))
    prepare(world)
    assert [row[0] for row in read_csv(world / 'root/kinetics_train.csv')] == [
        'aaaaaaaaaaa_000100_000110',
        'aaaaaaaaaaa_000100_000110',
    ]  # 105 lies in the middle of both; the first serves
    (world / 'root/rawframes/aaaaaaaaaaa_000100_000110/img_00007.jpg').unlink()
    prepare(world)
    assert [row[:2] for row in read_csv(world / 'root/kinetics_train.csv')] == [
        ['aaaaaaaaaaa_000103_000107', '105']
    ]
    assert reasons(world) == {
        (
            'aaaaaaaaaaa',
            '101',
        ): f'frames missing or empty: 1 of {10 * draw.FPS}, first img_00007.jpg in '
        'aaaaaaaaaaa_000100_000110'
    }


@pytest.mark.parametrize('second,start', [(104, 100), (106, 103), (109, 103), (101, 100)])
def test_the_most_centered_clip_is_taken(world, second, start):
    """Of two that cover a keyframe."""
    for first in 100, 103:
        fake_frames(world / 'root/rawframes', f'aaaaaaaaaaa_{first:06d}_{first + 8:06d}')
    annotate(world, annotation_rows('aaaaaaaaaaa', second))
    prepare(world)
    ((clip, *_),) = read_csv(world / 'root/kinetics_train.csv')
    assert clip == f'aaaaaaaaaaa_{start:06d}_{start + 8:06d}'


def test_other_programs_frames_and_ava_links_do_no_harm(world):
    frames = world / 'root/rawframes'
    fake_frames(frames, 'aaaaaaaaaaa_000103_000107')
    for name in 'flow_x_00001.jpg', 'flow_y_00001.jpg':
        (frames / 'aaaaaaaaaaa_000103_000107' / name).touch()
    (world / 'ava/-5KQ66BBWC4').mkdir(parents=True)
    (frames / '-5KQ66BBWC4').symlink_to(world / 'ava/-5KQ66BBWC4')
    (frames / 'broken_link').symlink_to(world / 'nowhere')
    (frames / 'aaaaaaaaaaa_000203_000207').symlink_to(world / 'nowhere')
    (frames / 'notes.txt').touch()
    annotate(
        world,
        annotation_rows('aaaaaaaaaaa', 105)
        + annotation_rows('-5KQ66BBWC4', 1000)
        + annotation_rows('aaaaaaaaaaa', 205),
    )
    prepare(world)
    assert len(read_csv(world / 'root/kinetics_train.csv')) == 1
    assert reasons(world) == {
        ('-5KQ66BBWC4', '1000'): 'no clip holds this keyframe',
        (
            'aaaaaaaaaaa',
            '205',
        ): 'unreadable frames: No such file or directory in aaaaaaaaaaa_000203_000207',
    }


@pytest.mark.parametrize(
    'text',
    [b'\xef\xbb\xbf%s', b'%s\r\n\r\n', b'"aaaaaaaaaaa","105","0.1","0.2","0.5","0.9","12"\n%s'],
)
def test_csv_as_spreadsheets_leave_it(world, text):
    fake_frames(world / 'root/rawframes', 'aaaaaaaaaaa_000103_000107')
    annotate(world, text % b'aaaaaaaaaaa,105.0,0.1,0.2,0.5,0.9,12')
    prepare(world)
    assert {tuple(row) for row in read_csv(world / 'root/kinetics_train.csv')} == {
        ('aaaaaaaaaaa_000103_000107', '105', '0.100', '0.200', '0.500', '0.900', '12', '-1')
    }


def test_malformed_lines_are_reported(world):
    fake_frames(world / 'root/rawframes', 'aaaaaaaaaaa_000103_000107')
    annotate(
        world,
        annotation_rows('aaaaaaaaaaa', 105).encode()
        + b'aaaaaaaaaaa,\xff\xfe\n../../../etc,1,0,0,1,1,1\n'
        + b'x' * 1_000_000
        + b'\n',
    )
    said = prepare(world).stdout
    assert '3 skipped: malformed annotation' in said
    assert said.endswith('  report: ' + str(world / 'root/reports/prepare_annotation_train.csv\n'))
    assert [
        row[2].split(':')[1] for row in read_report(world / 'root', 'prepare_annotation_train')
    ] == [' line 2', ' line 3', ' line 4']
    assert len(read_csv(world / 'root/kinetics_train.csv')) == 1


def test_second_run_changes_nothing(world):
    fake_frames(world / 'root/rawframes', 'aaaaaaaaaaa_000103_000107')
    annotate(world, annotation_rows('aaaaaaaaaaa', 105, 3) + annotation_rows('aaaaaaaaaaa', 109))
    prepare(world)
    before = snapshot(world)
    times = {path: path.stat().st_mtime_ns for path in world.rglob('*')}
    for workers in '1', '-1':
        prepare(world, f'--num_workers={workers}')
    assert snapshot(world) == before
    assert {path: path.stat().st_mtime_ns for path in world.rglob('*')} == times


def test_errors_say_what_to_do(world):
    assert 'run Step 2' in errors(prepare(world, code=1))
    annotate(world, annotation_rows('aaaaaaaaaaa', 105))
    assert 'run Step 3' in errors(prepare(world, code=1))
    (world / 'root/rawframes').mkdir()
    assert 'holds no clip of the 1 annotated videos' in errors(prepare(world, code=1))
    fake_frames(world / 'root/rawframes', 'aaaaaaaaaaa_000103_000107', 4 * draw.FPS - 1)
    (world / 'root/kinetics_train.csv').write_text('of an earlier run\n')
    assert 'no annotated keyframe has a usable clip' in errors(prepare(world, code=1))
    assert (world / 'root/kinetics_train.csv').read_text() == 'of an earlier run\n'
    assert not list((world / 'root').glob('*.part'))
