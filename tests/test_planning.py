"""Properties of the planning, for any set of annotations and sources."""

import ast
import itertools
import re
import tempfile
from collections import defaultdict
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import cut_kinetics
import prepare_annotation
from demo import SCRIPTS
from fetch_proposal import Keyframe, parse_clip, plan_frames
from helpers import REPO

GOOD_LINES = [
    'aaaaaaaaaaa,5.005,0.1,0.2,0.5,0.9,12',
    'aaaaaaaaaaa,7',
    'aaaaaaaaaaa,6,0.1,6.1e-05,1,1.000,80',
]

VIDEO = 'aB_-0123456'
sources = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 300), st.integers(0, 2)), max_size=6, unique=True
).map(
    lambda found: [
        cut_kinetics.Source(f'{copy}/{start}', VIDEO, start, start + length)
        for start, length, copy in found
    ]
)
timestamps = st.sets(st.integers(0, 620), min_size=1, max_size=12).map(sorted)
video_ids = st.text('abcXYZ012_-', min_size=1, max_size=64)


@given(sources, timestamps)
def test_every_keyframe_in_a_source_is_in_its_clip(found, wanted):
    """With two seconds around it, where the source has them; Step 5 finds the clip."""
    keyframes, names = {VIDEO: wanted}, []
    for source in found:
        clips = cut_kinetics.plan_clips(source, keyframes)
        for clip in clips:
            assert source.start <= clip.start < clip.end <= source.end
            assert prepare_annotation.parse_clip(clip.name) == clip
            for timestamp in cut_kinetics.keyframes_in(clip, keyframes):
                assert timestamp - clip.start >= 2 or clip.start == source.start
                assert clip.end - timestamp >= 2 or clip.end == source.end
        names += [clip.name for clip in clips]
        for first, second in itertools.pairwise(clips):
            assert second.start - first.end >= cut_kinetics.MAX_GAP_S - 3
    clips = cut_kinetics.find_covering_clips(names, keyframes)
    assert {timestamp for found in clips.values() for timestamp in found} == {
        timestamp
        for timestamp in wanted
        for source in found
        if source.start <= timestamp < source.end
    }


@given(video_ids, st.integers(0, 999_000), st.integers(1, 900))
def test_names_parse_back(video_id, start, length):
    name = f'{video_id}_{start:06d}_{start + length:06d}'
    clip = prepare_annotation.parse_clip(name)
    assert clip == (name, video_id, start, start + length)
    path = f'any folder/{name}.mp4'
    assert cut_kinetics.parse_source(path) == (path, video_id, start, start + length)


@given(st.lists(st.text(max_size=60) | st.sampled_from(GOOD_LINES), max_size=6))
def test_lines_of_annotations_are_rows_or_malformed(lines):
    """In any company."""
    lines += [GOOD_LINES[0]]  # without one, Step 5 would refuse the file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'rows.csv'
        path.write_text('\n'.join(lines), errors='replace')
        annotations, malformed = prepare_annotation.read_annotations(path)
        count = sum(bool(line.strip()) for line in open(path, encoding='utf-8-sig'))
    assert len(annotations) + len(malformed) == count
    assert all('\n' not in reason and len(reason) < 400 for _, _, reason in malformed)
    for video_id, timestamp, box, action in annotations:
        assert re.fullmatch('[A-Za-z0-9_-]{1,64}', video_id)
        assert 0 <= timestamp < 1e6 and len(box) in (0, 4) and bool(box) == (action > 0)
    assert len(annotations) >= len([line for line in lines if line in GOOD_LINES])


def keyframe_of(clip: str, timestamp: int) -> Keyframe:
    return Keyframe(parse_clip(clip), timestamp)


def test_a_keyframe_is_detected_in_its_own_clip():
    first, second = 'aaaaaaaaaaa_000010_000014', 'aaaaaaaaaaa_000012_000016'
    frames = plan_frames([keyframe_of(first, 12), keyframe_of(second, 13)], 1, Path())
    assert {frame.keyframe.timestamp: frame.keyframe.clip.name for frame in frames} == {
        11: first,
        12: first,
        13: second,
        14: second,
    }


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(0, 3),
)
def test_planned_frames(picked, neighbors):
    """Keyframes and their neighbors within the clip, each once."""
    keyframes = [keyframe_of(f'{index}_000010_000020', 10 + second) for index, second in picked]
    frames = plan_frames(keyframes, neighbors, Path())
    assert [frame.keyframe.key for frame in frames] == sorted(
        {
            f'{clip.video_id},{timestamp + distance:04d}'
            for clip, timestamp in keyframes
            for distance in range(-neighbors, neighbors + 1)
            if 10 <= timestamp + distance < 20
        }
    )


# Names that scripts share, and why their meanings differ
MAY_DIFFER = {
    'build_parser': "each step's own arguments",
    'parse_args': "each step's own arguments",
    'main': "each step's own work",
    'Options': "what each step's workers need",
    'check_clip': 'Step 5 falls back on the video, Step 7b checks what training will read',
    'read_proposals': 'Step 7a stops at a broken pickle, Step 7b reports it',
}


def definitions(script: Path) -> dict[str, str]:
    """The source text of all that a script defines at its top level."""
    text, found = script.read_text(), {}
    for node in ast.parse(text).body:
        names = [getattr(node, 'name', None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            names = [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]
        found |= {name: ast.get_source_segment(text, node) for name in names if name}
    return found


def test_what_stands_in_two_scripts_is_the_same():
    """They stand alone and share no module: what changes in one of them changes in the others."""
    texts = defaultdict(set)
    for script in SCRIPTS:
        for name, text in definitions(REPO / script).items():
            texts[name].add((script, text))
    shared = {name: {text for _, text in found} for name, found in texts.items() if len(found) > 1}
    assert {'MAX_QUEUED', 'FPS', 'parse_clip', 'ARRAY_PARTS', 'run_all'} <= shared.keys()
    assert {name for name, found in shared.items() if len(found) > 1} == set(MAY_DIFFER)
