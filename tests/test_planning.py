"""Properties of the planning, for any set of annotations and sources."""

import ast
import re
import tempfile
from collections import defaultdict
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import cut_kinetics
import prepare_annotation
from demo import SCRIPTS
from fetch_proposal import plan_frames
from helpers import REPO

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


# Names that scripts share, and why their meanings differ
MAY_DIFFER = {
    'build_parser': "each step's own arguments",
    'parse_args': "each step's own arguments",
    'main': "each step's own work",
    'ROW': "of Google's annotations in Steps 3 and 5, of MMAction2's in Steps 6 and 7a",
    'FRACTION': "of Google's annotations, which are checked, or of Step 5's, which are not",
    'check_clip': 'Step 5 falls back on the video, Step 7b checks what training will read',
    'read_proposals': 'Step 7a stops at a broken pickle, Step 7b reports it',
}


def definitions(script: Path) -> dict[str, str]:
    """The source text of all that a script defines at its top level."""
    text, found = script.read_text(), {}
    for node in ast.parse(text).body:
        names = [getattr(node, 'name', None)]
        if isinstance(node, ast.Assign):
            names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
        found |= {name: ast.get_source_segment(text, node) for name in names if name}
    return found


def test_what_stands_in_two_scripts_is_the_same():
    """They stand alone and share no module: what changes in one of them changes in the others."""
    texts = defaultdict(set)
    for script in SCRIPTS:
        for name, text in definitions(REPO / script).items():
            texts[name].add((script, text))
    shared = {name: {text for _, text in found} for name, found in texts.items() if len(found) > 1}
    assert {'AHEAD', 'FPS', 'to_path', 'ARRAY_PARTS', 'run_all', 'write'} <= shared.keys()
    assert {name for name, found in shared.items() if len(found) > 1} == set(MAY_DIFFER)
