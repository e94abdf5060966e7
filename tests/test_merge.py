"""Step 7: AVA's annotations and frames joined with the Kinetics part."""

import hashlib
import os
import pickle
import pickletools
import re
import shutil

import numpy as np
import pytest

import sample_world
from helpers import (
    Evil,
    errors,
    fake_frames,
    here,
    load,
    numbered_source,
    read_csv,
    read_report,
    run,
    snapshot,
)

CSV, PICKLE = (
    'annotations/ava_train_v2.2.csv',
    'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl',
)
AVA_ROWS = (
    '-5KQ66BBWC4,0902,0.100,0.200,0.300,0.400,12,0\n'
    'AVA_mov-1_x,1798,0.100,0.200,0.300,0.400,80,17\n'
)
AVA = {
    '-5KQ66BBWC4,0902': np.array([[0.1, 0.2, 0.3, 0.4, 0.9], [0.2, 0.2, 0.4, 0.4, 0.1]]),
    'AVA_mov-1_x,1798': np.ones((1, 5)),
}
KINETICS_ROWS = 'aaaaaaaaaaa_000103_000107,105,0.100,0.200,0.500,0.900,12,-1\n'
KINETICS = {
    'aaaaaaaaaaa,0105': np.full((2, 5), 0.75),
    'aaaaaaaaaaa,0104': np.full((1, 5), 0.5),
    '-5KQ66BBWC4,0902': np.zeros((1, 5)),
}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / 'root'
    (root / 'annotations').mkdir(parents=True)
    (root / CSV).write_text(AVA_ROWS.rstrip('\n'))  # no newline at the end, as editors leave it
    (root / PICKLE).write_bytes(sample_world.fair_pickle(AVA))
    (root / 'kinetics_train.csv').write_text(KINETICS_ROWS)
    (root / 'kinetics_proposal.pkl').write_bytes(pickle.dumps(KINETICS))
    return root


def merge(root, **kwargs):
    return run('merge_annotations.py', f'--avakinetics_root={root}', **kwargs)


def test_kinetics_rows_come_first_and_ava_wins(root):
    done = merge(root)
    assert (root / CSV).read_text() == KINETICS_ROWS + AVA_ROWS
    merged = load(root / PICKLE)
    assert merged.keys() == {*AVA, 'aaaaaaaaaaa,0105', 'aaaaaaaaaaa,0104'}
    for key, boxes in merged.items():
        assert boxes.dtype == np.float64 and (boxes == AVA.get(key, KINETICS.get(key))).all()
    assert (
        '3 rows' in done.stdout
        and '1 of Kinetics, 2 of AVA' in done.stdout
        and '1 keys in both' in done.stdout
    )


def test_merging_twice_is_merging_once_and_a_later_merge_is_a_first_one(root):
    merge(root)
    before = snapshot(root)
    merge(root)
    assert snapshot(root) == before
    assert (root / 'annotations/ava_train_v2.2.ava_only.csv').read_text() == AVA_ROWS.rstrip('\n')
    assert (
        load(root / 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.ava_only.pkl').keys()
        == AVA.keys()
    )
    rows = KINETICS_ROWS.replace(',105,', ',104,')
    (root / 'kinetics_train.csv').write_text(rows)
    (root / 'kinetics_proposal.pkl').write_bytes(
        pickle.dumps({'aaaaaaaaaaa,0104': np.ones((3, 5))})
    )
    merge(root)
    assert (root / CSV).read_text() == rows + AVA_ROWS
    assert load(root / PICKLE).keys() == {*AVA, 'aaaaaaaaaaa,0104'}


def test_a_merge_of_quite_other_videos_is_a_first_one(root):
    merge(root)
    (root / 'kinetics_train.csv').write_text(KINETICS_ROWS.replace('a' * 11, 'b' * 11))
    (root / 'kinetics_proposal.pkl').write_bytes(
        pickle.dumps({'bbbbbbbbbbb,0105': np.ones((1, 5))})
    )
    for _ in range(2):
        merge(root)
        assert (root / CSV).read_text() == KINETICS_ROWS.replace('a' * 11, 'b' * 11) + AVA_ROWS
        assert load(root / PICKLE).keys() == {*AVA, 'bbbbbbbbbbb,0105'}
        assert load(root / PICKLE.replace('.pkl', '.ava_only.pkl')).keys() == AVA.keys()


def test_a_video_that_both_parts_hold(root):
    rows = KINETICS_ROWS + '-5KQ66BBWC4_000900_000904,902,0.100,0.200,0.500,0.900,12,-1\n'
    (root / 'kinetics_train.csv').write_text(rows)
    for _ in range(2):
        assert '1 keys in both' in merge(root).stdout
        assert (root / CSV).read_text() == rows + AVA_ROWS
        assert (load(root / PICKLE)['-5KQ66BBWC4,0902'] == AVA['-5KQ66BBWC4,0902']).all()


def test_ava_copied_again_is_taken_anew(root):
    merge(root)
    before = snapshot(root)
    (root / CSV).write_text(AVA_ROWS.rstrip('\n'))
    merge(root)
    assert snapshot(root) == before
    (root / CSV).write_text(AVA_ROWS.replace('0.100', '0.150'))  # a corrected AVA
    (root / PICKLE).write_bytes(sample_world.fair_pickle({'-5KQ66BBWC4,0903': np.ones((1, 5))}))
    merge(root)
    assert (root / CSV).read_text() == KINETICS_ROWS + AVA_ROWS.replace('0.100', '0.150')
    assert load(root / PICKLE).keys() == {'-5KQ66BBWC4,0903', *KINETICS}


def test_a_merge_that_was_killed_between_its_two_files_is_mended(root):
    before = {name: (root / name).read_bytes() for name in (CSV, PICKLE)}
    merge(root)
    after = snapshot(root)
    for name, content in before.items():
        (root / name).write_bytes(content)
        merge(root)
        assert snapshot(root) == after


def test_the_pickle_loads_in_every_numpy(root):
    merge(root)
    stream = (root / PICKLE).read_bytes()
    names = {
        text
        for _, text, _ in pickletools.genops(stream)
        if isinstance(text, str) and 'numpy' in text
    }
    assert names == {'numpy'}
    assert b'numpy._core' not in stream and b'numpy.core' not in stream


def test_both_files_change_or_none(root):
    before = snapshot(root)
    (root / 'kinetics_proposal.pkl').write_bytes(b'broken')
    assert 'is no pickle of proposals' in errors(merge(root, code=1))
    (root / 'kinetics_proposal.pkl').write_bytes(pickle.dumps(KINETICS))
    (root / PICKLE).unlink()
    assert 'cp -r' in errors(merge(root, code=1))
    (root / PICKLE).write_bytes(sample_world.fair_pickle(AVA))
    assert snapshot(root) == before


@pytest.mark.parametrize(
    'content',
    [
        pickle.dumps(Evil()),
        pickle.dumps({'aaaaaaaaaaa,0105': Evil()}),
        pickle.dumps([1]),
        b'',
        b'\x80\x04.',
        pickle.dumps({1: 2})[:-1],
        b'cbuiltins\neval\n(S"1"\ntR.',
        b'cnumpy.core.multiarray\nscalar\n.',
        pickle.dumps({'a': np.array([Evil()], object)}),
    ],
)
def test_pickles_cannot_run_code(root, tmp_path, content):
    before = (root / PICKLE).read_bytes()
    (root / 'kinetics_proposal.pkl').write_bytes(content)
    assert 'is no pickle of proposals' in errors(merge(root, code=1, cwd=tmp_path))
    assert not (tmp_path / 'pwned').exists() and (root / PICKLE).read_bytes() == before


@pytest.mark.parametrize('protocol', range(2, 6))
def test_pickles_of_every_protocol_are_read(root, protocol):
    (root / 'kinetics_proposal.pkl').write_bytes(pickle.dumps(KINETICS, protocol=protocol))
    merge(root)
    assert len(load(root / PICKLE)) == 4


@pytest.mark.parametrize('names', [b'cnumpy.core.', b'cnumpy._core.'], ids=['NumPy 1', 'NumPy 2'])
def test_pickles_of_every_numpy_are_read(root, names):
    content = re.sub(rb'cnumpy\._?core\.', names, pickle.dumps(KINETICS, protocol=2))
    assert names in content
    (root / 'kinetics_proposal.pkl').write_bytes(content)
    merge(root)
    assert len(load(root / PICKLE)) == 4


def test_what_training_would_choke_on_is_left_out_and_reported(root):
    (root / 'kinetics_train.csv').write_text(
        KINETICS_ROWS
        + 'aaaaaaaaaaa_000103_000107,x,0.1,0.2,0.5,0.9,12,-1\n'
        + '../../etc,105,0.1,0.2,0.5,0.9,12,-1\n'
    )
    (root / 'kinetics_proposal.pkl').write_bytes(
        pickle.dumps(
            {
                **KINETICS,
                'bbbbbbbbbbb,0001': np.empty((0, 5)),
                'ccccccccccc,0001': np.full((1, 5), np.nan),
                'x': np.ones((1, 5)),
                'ddddddddddd,0001': 'boxes',
                'eeeeeeeeeee,0001': np.ones((1, 3)),
            }
        )
    )
    assert '6 rows or proposals left out' in merge(root).stdout
    assert (root / CSV).read_text() == KINETICS_ROWS + AVA_ROWS and len(load(root / PICKLE)) == 4
    assert len(read_csv(root / 'reports/merge_annotations_train.csv')) == 7


def test_merge_errors_say_what_to_do(root):
    for path, hint in (
        (CSV, 'cp -r'),
        ('kinetics_proposal.pkl', 'do Step 6'),
        ('kinetics_train.csv', 'do Step 5'),
    ):
        content = (root / path).read_bytes()
        (root / path).unlink()
        assert hint in errors(merge(root, code=1))
        (root / path).write_bytes(content)
    (root / 'kinetics_train.csv').write_text('')
    assert 'holds no row' in errors(merge(root, code=1))
    (root / 'kinetics_train.csv').write_text(KINETICS_ROWS)
    (root / CSV).write_text(KINETICS_ROWS + AVA_ROWS)  # merged by MMAction2's script before
    assert "AVA's own is not kept beside it" in errors(merge(root, code=1))


def test_another_programs_merge_over_ours_gives_way(root):
    """It holds boxes of Kinetics that are old by now; AVA's own are those that our first merge
    kept.
    """
    merge(root)
    old = load(root / PICKLE)
    old[next(iter(KINETICS))] = np.full((1, 5), 0.125)
    (root / PICKLE).write_bytes(pickle.dumps(old))
    said = merge(root).stdout
    merged = load(root / PICKLE)
    assert merged.keys() == old.keys() and '2 of Kinetics, 2 of AVA' in said
    for key, boxes in {**KINETICS, **AVA}.items():
        np.testing.assert_array_equal(merged[key], boxes)


@pytest.fixture
def worlds(root, tmp_path):
    """A merged ROOT with one Kinetics clip, and AVA with its two videos' frames."""
    sample_world.draw_other_annotations(root / 'annotations')
    merge(root)
    fake_frames(root / 'rawframes', 'aaaaaaaaaaa_000103_000107')
    for video, last in ('-5KQ66BBWC4', 61), ('AVA_mov-1_x', 26941):
        (tmp_path / 'ava/rawframes' / video).mkdir(parents=True)
        (tmp_path / 'ava/rawframes' / video / f'img_{last:05d}.jpg').write_bytes(b'frame')
    return root, tmp_path / 'ava'


def link(root, ava, **kwargs):
    return here('softlink_ava.py', f'--avakinetics_root={root}', f'--ava_root={ava}', **kwargs)


def test_links_are_absolute_and_a_second_run_changes_nothing(worlds, tmp_path):
    root, ava = worlds
    done = here('softlink_ava.py', '--avakinetics_root=root', '--ava_root=ava', cwd=tmp_path)
    assert os.readlink(root / 'rawframes/-5KQ66BBWC4') == f'{ava}/rawframes/-5KQ66BBWC4'
    assert (
        '2 linked now' in done.stdout
        and '1 Kinetics clips and 2 AVA videos annotated, 3 rows, 4 frames' in done.stdout
    )
    assert 'all 3 have their frames: ready for training' in done.stdout
    before = snapshot(root)
    assert '2 linked already' in link(root, ava).stdout
    assert snapshot(root) == before


def test_wrong_links_are_mended_and_real_folders_left_alone(worlds, tmp_path):
    root, ava = worlds
    (root / 'rawframes/-5KQ66BBWC4').symlink_to(tmp_path / 'nowhere')
    (root / 'rawframes/AVA_mov-1_x').mkdir()
    (root / 'rawframes/AVA_mov-1_x/img_26941.jpg').write_text('mine')
    done = link(root, ava)
    assert (
        '1 broken or wrong links mended' in done.stdout
        and '1 real folders left alone' in done.stdout
    )
    assert os.readlink(root / 'rawframes/-5KQ66BBWC4') == f'{ava}/rawframes/-5KQ66BBWC4'
    assert (root / 'rawframes/AVA_mov-1_x/img_26941.jpg').read_text() == 'mine'


def test_the_closing_check_finds_what_training_would_miss(worlds):
    root, ava = worlds
    (root / 'rawframes/aaaaaaaaaaa_000103_000107/img_00120.jpg').unlink()
    (ava / 'rawframes/AVA_mov-1_x/img_26941.jpg').unlink()
    assert 'not complete' in errors(link(root, ava, code=1))
    assert read_report(root, 'softlink_ava') == [
        ['AVA_mov-1_x', 'frames missing or empty: 1 of 1, first img_26941.jpg'],
        ['aaaaaaaaaaa_000103_000107', 'frames missing or empty: 1 of 120, first img_00120.jpg'],
    ]


@pytest.mark.parametrize(
    'change,name,reason',
    [
        (
            lambda root, ava: (root / 'annotations/ava_val_v2.2.csv').unlink(),
            'ava_val_v2.2.csv',
            "file missing: copy it from AVA's annotation folder",
        ),
        (
            lambda root, ava: (root / 'kinetics_train.csv').write_text(KINETICS_ROWS),
            'ava_train_v2.2.csv',
            'older than kinetics_train.csv: merge again, Step 7 (merge_annotations.py)',
        ),
        (
            lambda root, ava: (root / 'kinetics_train.csv').unlink(),
            'kinetics_train.csv',
            'file missing: do Step 5 (prepare_annotation.py)',
        ),
        (
            lambda root, ava: (root / CSV).write_text(AVA_ROWS),
            'ava_train_v2.2.csv',
            'no Kinetics row: do Step 7 (merge_annotations.py)',
        ),
        (
            lambda root, ava: (root / PICKLE).write_bytes(b'broken'),
            PICKLE.split('/')[1],
            'unreadable: do Step 7 (merge_annotations.py)',
        ),
        (
            lambda root, ava: (
                root / 'rawframes/aaaaaaaaaaa_000103_000107/img_00007.jpg'
            ).write_bytes(b''),
            'aaaaaaaaaaa_000103_000107',
            'frames missing or empty: 1 of 120, first img_00007.jpg',
        ),
        (
            lambda root, ava: (ava / 'rawframes/-5KQ66BBWC4/img_00061.jpg').write_bytes(b''),
            '-5KQ66BBWC4',
            'frames missing or empty: 1 of 1, first img_00061.jpg',
        ),
        (
            lambda root, ava: shutil.rmtree(root / 'rawframes/aaaaaaaaaaa_000103_000107'),
            'aaaaaaaaaaa_000103_000107',
            'clip missing: no video',
        ),
    ],
    ids=[
        'validation file',
        'older rows',
        'no list',
        'not merged',
        'pickle',
        'empty frame',
        'empty frame of AVA',
        'no clip',
    ],
)
def test_not_ready_for_training(worlds, change, name, reason):
    root, ava = worlds
    assert 'ready for training' in link(root, ava).stdout
    change(root, ava)
    done = link(root, ava, code=1)
    assert (
        'not complete' in errors(done)
        and name in errors(done)
        and 'ready for training' not in done.stdout
    )
    assert [name, reason] in read_csv(root / 'reports/softlink_ava.csv')


@pytest.mark.parametrize(
    'seconds,problem',
    [
        (4, None),
        (3.5, 'wrong number of frames: 105 instead of 120'),
        (0, 'unreadable clip: decord cannot open it'),
    ],
)
def test_clips_that_are_read_as_videos_have_their_frames(worlds, seconds, problem):
    root, ava = worlds
    shutil.rmtree(root / 'rawframes')
    clip = root / 'videos/aaaaaaaaaaa_000103_000107.mp4'
    numbered_source(clip, dict(seconds=seconds or 1))
    if not seconds:
        clip.write_bytes(clip.read_bytes()[:500])
    if problem:
        assert problem in errors(link(root, ava, code=1))
    else:
        assert 'ready for training, the Kinetics part from its videos' in link(root, ava).stdout


def test_a_pickle_of_another_list_is_refused_with_the_command_that_mends_it(root):
    rows = (root / 'kinetics_train.csv').read_bytes()
    with open(root / 'kinetics_proposal.pkl', 'ab') as file:
        file.write(f'\nmade of {hashlib.sha256(rows).hexdigest()}\n'.encode())
    merge(root)
    (root / 'kinetics_train.csv').write_bytes(rows * 2)
    before = snapshot(root)
    command = f'Step 6: fetch_proposal.py --datalist={root}/kinetics_train.csv'
    assert command in errors(merge(root, code=1))
    assert snapshot(root) == before


def test_avas_own_folder_is_not_merged_into(root, tmp_path):
    (root / 'annotations').rename(tmp_path / 'ava_annotations')
    (root / 'annotations').symlink_to(tmp_path / 'ava_annotations')
    before = snapshot(tmp_path)
    assert (
        "would change AVA's own files; remove the link" in errors(merge(root, code=1))
        and snapshot(tmp_path) == before
    )


def test_link_errors_say_what_to_do(worlds, tmp_path):
    root, ava = worlds
    assert 'same folder' in errors(link(root, root, code=1))
    (root / CSV).write_text(KINETICS_ROWS + '\nno row\n')
    (root / PICKLE).write_bytes(b'broken')
    assert 'no readable frames' in link(root, ava, code=1).stdout
    assert 'set --ava_root' in errors(link(root, tmp_path / 'none', code=1))
    (tmp_path / 'bare/rawframes').mkdir(parents=True)
    assert 'holds no folder' in errors(link(root, tmp_path / 'bare', code=1))
    assert 'do Step 3' in errors(link(tmp_path / 'bare2', ava, code=1))
    (root / CSV).unlink()
    assert 'do Step 7' in errors(link(root, ava, code=1))
