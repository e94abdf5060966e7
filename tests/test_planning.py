"""Properties of the planning, for any set of annotations and sources."""

import inspect
import re
import tempfile
from pathlib import Path

from hypothesis import given
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
    'aaaaaaaaaaa,6,0.1,6.1e-05,1,1.000,80',
]

VIDEO = 'aB_-0123456'
sources = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12), st.integers(0, 2)), max_size=6, unique=True
).map(
    lambda found: [
        cut_kinetics.Source(VIDEO, start, start + length, f'{copy}/{start}')
        for start, length, copy in found
    ]
)
seconds = st.sets(st.integers(0, 75), min_size=1, max_size=12).map(sorted)


@given(sources, seconds)
def test_every_second_that_a_source_holds_is_in_its_clip(found, wanted):
    """With two seconds around it, where the source has them; Step 5 finds the clip."""
    keyframes, names = {VIDEO: wanted}, []
    for source in found:
        if held := cut_kinetics.find_held(source, keyframes):
            names.append(cut_kinetics.clip_name(source, held))
            clip = cut_kinetics.parse_name(names[-1])
            assert source.start <= clip.start < clip.end <= source.end
            for second in held:
                assert clip.start <= second < clip.end
                assert second - clip.start >= 2 or clip.start == source.start
                assert clip.end - second >= 2 or clip.end == source.end
    covered = {second for (_, second), _ in cut_kinetics.find_keyframes(names, keyframes)}
    assert covered == {
        second for second in wanted for source in found if source.start <= second < source.end
    }


@given(
    st.text('abcXYZ012_-', min_size=11, max_size=11), st.integers(0, 999_000), st.integers(1, 900)
)
def test_names_parse_back(video, start, length):
    source = cut_kinetics.Source(video, start, start + length, '')
    name = cut_kinetics.clip_name(source, [start, start + length - 1])
    parsed = prepare_annotation.CLIP_NAME.fullmatch(name[:-4])
    assert (parsed[1], int(parsed[2]), int(parsed[3])) == (video, start, start + length)
    assert cut_kinetics.parse_name(name) == source._replace(path=name)


@given(st.lists(st.text(max_size=60) | st.sampled_from(GOOD_LINES), max_size=6))
def test_lines_of_annotations_are_rows_or_problems(lines):
    """In any company."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'rows.csv'
        path.write_text('\n'.join(lines), errors='replace')
        rows, problems = prepare_annotation.read_annotations(path)
        count = sum(bool(line.strip()) for line in open(path, encoding='utf-8-sig'))
    assert len(rows) + len(problems) == count
    assert all('\n' not in reason and len(reason) < 400 for _, _, reason in problems)
    for video, second, numbers in rows:
        assert re.fullmatch('[A-Za-z0-9_-]{11}', video)
        assert 0 <= second < 1e6 and len(numbers) in (0, 5)
    assert len(rows) >= len([line for line in lines if line in GOOD_LINES])


def test_a_keyframe_is_detected_in_its_own_clip():
    first, second = 'aaaaaaaaaaa_000010_000014', 'aaaaaaaaaaa_000012_000016'
    frames = plan_frames([(first, 12), (second, 13)], 1, Path())
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
    frames = plan_frames(keyframes, neighbors, Path())
    assert {frame.key for frame in frames} == {
        f'{clip[:11]},{second + distance:04d}'
        for clip, second in keyframes
        for distance in range(-neighbors, neighbors + 1)
        if 10 <= second + distance < 20
    }
    assert [frame[1:3] for frame in frames] == sorted({frame[1:3] for frame in frames})


def test_what_stands_in_two_scripts_is_the_same():
    """They stand alone and share no module, so a function that changes in one of them changes in
    the other.
    """
    for one, other, name in (
        (cut_kinetics, extract_rgb_frames, 'run_all'),
        (cut_kinetics, extract_rgb_frames, 'connect'),
        (cut_kinetics, extract_rgb_frames, 'shield'),
        (cut_kinetics, extract_rgb_frames, 'workspace'),
        (cut_kinetics, extract_rgb_frames, 'write'),
        (cut_kinetics, extract_rgb_frames, 'write_csv'),
        (cut_kinetics, fetch_proposal, 'run_all'),
        (cut_kinetics, fetch_proposal, 'connect'),
        (cut_kinetics, fetch_proposal, 'shield'),
        (cut_kinetics, fetch_proposal, 'write'),
        (cut_kinetics, fetch_proposal, 'write_csv'),
        (cut_kinetics, prepare_annotation, 'write'),
        (cut_kinetics, prepare_annotation, 'write_csv'),
        (fetch_proposal, merge_annotations, 'Pickler'),
        (merge_annotations, softlink_ava, 'Unpickler'),
        (cut_kinetics, merge_annotations, 'write'),
        (cut_kinetics, softlink_ava, 'write'),
        (cut_kinetics, softlink_ava, 'write_csv'),
    ):
        assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(other, name)), (
            name
        )
    assert cut_kinetics.ROW == prepare_annotation.ROW
