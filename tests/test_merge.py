"""Step 7: AVA's annotations and frames joined with the Kinetics part."""

import hashlib
import json
import pickle
import pickletools
import re

import numpy as np
import pytest

import sample_world
from helpers import Evil, errors, load, run, snapshot

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
        ': 3, ' in done.stdout
        and '1 of Kinetics, 2 of AVA' in done.stdout
        and '(in both: 1)' in done.stdout
    )


def test_merging_twice_is_merging_once(root):
    """And a later merge, of other files, is like a first one."""
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
        assert '(in both: 1)' in merge(root).stdout
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


def test_avas_rows_copied_again_where_the_record_is_gone(root):
    """What the pickle holds tells that it is merged; else its boxes of Kinetics would stay."""
    merge(root)
    (root / CSV).write_text(AVA_ROWS.rstrip('\n'))
    (root / 'reports/merge_annotations_train.json').unlink()
    (root / 'kinetics_proposal.pkl').write_bytes(
        pickle.dumps({'aaaaaaaaaaa,0105': np.ones((1, 5))})
    )
    merge(root)
    assert load(root / PICKLE).keys() == {*AVA, 'aaaaaaaaaaa,0105'}
    assert (load(root / PICKLE)['aaaaaaaaaaa,0105'] == 1).all()
    assert load(root / PICKLE.replace('.pkl', '.ava_only.pkl')).keys() == AVA.keys()


def test_a_merge_killed_between_its_files(root):
    """The next one completes it."""
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


def test_a_frame_without_boxes_is_left_out(root):
    proposals = {**KINETICS, 'bbbbbbbbbbb,0001': np.empty((0, 5))}
    (root / 'kinetics_proposal.pkl').write_bytes(pickle.dumps(proposals))
    merge(root)
    assert len(load(root / PICKLE)) == 4


def test_merge_errors_say_what_to_do(root):
    for path, hint in (
        (CSV, 'cp -r'),
        ('kinetics_proposal.pkl', 'run Step 6'),
        ('kinetics_train.csv', 'run Step 5'),
    ):
        content = (root / path).read_bytes()
        (root / path).unlink()
        assert hint in errors(merge(root, code=1))
        (root / path).write_bytes(content)
    (root / 'kinetics_train.csv').write_text('')
    assert 'is empty' in errors(merge(root, code=1))
    (root / 'kinetics_train.csv').write_text(KINETICS_ROWS)
    (root / CSV).write_text(KINETICS_ROWS + AVA_ROWS)  # merged by MMAction2's script before
    assert 'and its backup is missing' in errors(merge(root, code=1))


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


def test_avas_own_folder_is_not_merged_into(root, tmp_path):
    (root / 'annotations').rename(tmp_path / 'ava_annotations')
    (root / 'annotations').symlink_to(tmp_path / 'ava_annotations')
    before = snapshot(tmp_path)
    assert "would change AVA's own files; remove the link" in errors(merge(root, code=1))
    assert snapshot(tmp_path) == before


def test_a_pickle_of_another_list_is_refused(root):
    rows = (root / 'kinetics_train.csv').read_bytes()
    (root / 'reports').mkdir()
    record = {'datalist_sha256': rows, 'proposals_sha256': pickle.dumps(KINETICS)}
    record = {name: hashlib.sha256(content).hexdigest() for name, content in record.items()}
    (root / 'reports/fetch_proposal_train.json').write_text(json.dumps(record))
    merge(root)
    (root / 'kinetics_train.csv').write_bytes(rows * 2)
    before = snapshot(root)
    message = errors(merge(root, code=1))
    assert (
        f'another list than {root}/kinetics_train.csv; run Step 6 again with this list' in message
    )
    assert snapshot(root) == before


def test_a_data_set_of_version_1_is_accepted(root):
    """Its merged pickle ends with a line in place of the record."""
    merge(root)
    after = snapshot(root)
    digest = hashlib.sha256((root / 'kinetics_proposal.pkl').read_bytes()).hexdigest()
    with open(root / PICKLE, 'ab') as file:
        file.write(f'\nmerged with {digest}\n'.encode())
    (root / 'reports/merge_annotations_train.json').unlink()
    (root / CSV).write_text(AVA_ROWS.rstrip('\n'))  # else the rows would tell
    merge(root)
    assert snapshot(root) == after
