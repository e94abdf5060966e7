"""Properties of the planning, for any set of annotations and sources."""

import inspect
import re
import tempfile
from pathlib import Path
from unittest import mock

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

import cut_kinetics
import extract_rgb_frames
import fetch_proposal
import merge_annotations
import prepare_annotation
import softlink_ava
from fetch_proposal import plan_frames

GOOD_LINES = [
    'aaaaaaaaaaa,5.005,0.1,0.2,0.5,0.9,12',
    'aaaaaaaaaaa,7',
    '"aaaaaaaaaaa","6","0.1","0.2","0.5","0.9","12"',
]

VIDEO = 'aB_-0123456'
sources = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(0, 2)), max_size=6, unique=True
).map(
    lambda found: pd.DataFrame(
        [(VIDEO, start, start + length, f'{copy}/{start}', '') for start, length, copy in found],
        columns=['video', 'start', 'end', 'path', 'reason'],
    )
)
keyframes = st.sets(st.integers(0, 75), min_size=1, max_size=12).map(
    lambda seconds: pd.DataFrame(dict(video=VIDEO, second=sorted(seconds)))
)


@given(sources, keyframes)
def test_every_second_is_planned_once_in_the_source_where_it_is_most_centred(found, wanted):
    covered, clips = cut_kinetics.plan_clips(wanted, found)
    assert covered.second.is_unique
    for clip in clips.itertuples():
        start, end = clip.start + clip.offset, clip.start + clip.offset + clip.seconds
        assert clip.start <= start < end <= clip.end and clip.name == cut_kinetics.clip_name(
            VIDEO, start, end
        )
        for second in covered.second[covered.source == clip.Index]:
            assert start <= second < end
            assert second - start >= 2 or start == clip.start
            assert end - second >= 2 or end == clip.end
            assert all(
                abs(clip.start + clip.end - 2 * second) <= abs(other.start + other.end - 2 * second)
                for other in found.itertuples()
                if other.start <= second < other.end
            )
    assert set(covered.second) == {
        second for second in wanted.second if ((found.start <= second) & (second < found.end)).any()
    }


@given(sources, keyframes, st.sets(st.integers(0, 5)))
@settings(max_examples=200)
def test_every_second_is_in_a_clip_that_step_5_finds_or_in_one_report_row(found, wanted, broken):
    found.loc[found.index.isin(broken), 'reason'] = 'unreadable'
    working = found[found.reason == '']
    covered, planned = cut_kinetics.plan_clips(wanted, working)
    lost = cut_kinetics.find_lost(wanted, found, covered, 'absent')
    clips = pd.DataFrame(
        [
            dict(
                clip=name[:-4],
                video=VIDEO,
                start=int(name[12:18]),
                end=int(name[19:25]),
                problem='',
            )
            for name in planned.name
        ],
        columns=['clip', 'video', 'start', 'end', 'problem'],
    )
    chosen = set(prepare_annotation.choose_clips(clips, wanted).second)
    reported = {second for _, second, reason in lost if reason}
    assert len(lost) == len(reported)
    for second in wanted.second:
        held = ((working.start <= second) & (second < working.end)).any()
        assert (second in chosen) >= held and (second in reported) == (not held)


@given(
    st.text('abcXYZ012_-', min_size=11, max_size=11), st.integers(0, 999_000), st.integers(1, 900)
)
def test_names_parse_back(video, start, length):
    name = cut_kinetics.clip_name(video, start, start + length)
    parsed = prepare_annotation.CLIP_NAME.fullmatch(name[:-4])
    assert (parsed['id'], int(parsed['start']), int(parsed['end'])) == (
        video,
        start,
        start + length,
    )
    assert re.fullmatch(cut_kinetics.SOURCE_NAME, name)[1] == video


@given(st.lists(st.text(max_size=60) | st.sampled_from(GOOD_LINES), max_size=6))
def test_lines_of_annotations_are_rows_or_problems(lines):
    """In any company; Steps 3 and 5 agree on them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'rows.csv'
        path.write_text('\n'.join(lines), errors='replace')
        keyframes, nobody, problems = cut_kinetics.read_keyframes(path)
        table, the_same = prepare_annotation.read_annotations(path)
        count = sum(bool(line.strip()) for line in open(path, encoding='utf-8-sig'))
    assert problems == the_same and len(table) + len(problems) == count
    assert all('\n' not in reason and len(reason) < 400 for _, _, reason in problems)
    assert (
        all(re.fullmatch('[A-Za-z0-9_-]{11}', video) for video in table.video)
        and table.timestamp.between(0, 1e6).all()
    )
    people = table[table.x1.notna()]
    assert set(zip(people.video, people.timestamp.astype(int))) == set(
        keyframes.itertuples(index=False, name=None)
    )
    assert len(people) >= len([line for line in lines if line == GOOD_LINES[0]])
    assert nobody <= len(table) - len(people)


@given(st.lists(st.text(max_size=60) | st.sampled_from(GOOD_LINES), max_size=6), st.integers(1, 60))
def test_annotations_are_the_same_in_blocks_of_any_size(lines, block):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'rows.csv'
        path.write_text('\n'.join(lines), errors='replace', newline='\n')
        for module in cut_kinetics, prepare_annotation:
            whole, problems = module.read_annotations(path)
            with mock.patch.object(module, 'BLOCK', block):
                table, the_same = module.read_annotations(path)
            assert table.astype(str).equals(whole.astype(str)) and the_same == problems


def test_a_keyframe_is_detected_in_its_own_clip():
    first, second = 'aaaaaaaaaaa_000010_000014', 'aaaaaaaaaaa_000012_000016'
    frames = plan_frames([(first, 12), (second, 13)], 1)
    assert {frame.second: frame.clip for frame in frames} == {
        11: first,
        12: first,
        13: second,
        14: second,
    }


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 3),
)
def test_proposals_are_planned_for_keyframes_and_neighbours_within_the_clip(picked, neighbors):
    keyframes = [(f'{index:011d}_000010_000020', 10 + second) for index, second in picked]
    frames = plan_frames(keyframes, neighbors)
    assert {frame.key for frame in frames} == {
        f'{clip[:11]},{second + distance:04d}'
        for clip, second in keyframes
        for distance in range(-neighbors, neighbors + 1)
        if 10 <= second + distance < 20
    }
    assert [frame[1:] for frame in frames] == sorted({frame[1:] for frame in frames})


def test_what_stands_in_two_scripts_is_the_same():
    """They stand alone and share no module, so a function that changes in one of them changes in
    the other.
    """
    for one, other, name in (
        (cut_kinetics, extract_rgb_frames, 'run_all'),
        (cut_kinetics, extract_rgb_frames, 'shielded'),
        (cut_kinetics, prepare_annotation, 'read_annotations'),
        (fetch_proposal, merge_annotations, 'Pickler'),
        (fetch_proposal, softlink_ava, 'key_of'),
        (fetch_proposal, softlink_ava, 'best_overlaps'),
    ):
        assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(other, name)), (
            name
        )
