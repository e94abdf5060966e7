"""Properties of the planning, for any set of annotations and sources."""
import re
import tempfile
from pathlib import Path

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

import cut_kinetics
import prepare_annotation
from cut_kinetics import Source
from fetch_proposal import plan_frames

GOOD_LINES = ['aaaaaaaaaaa,5.005,0.1,0.2,0.5,0.9,12', 'aaaaaaaaaaa,7', '"aaaaaaaaaaa","6","0.1","0.2","0.5","0.9","12"']

sources = st.lists(st.builds(lambda start, length, copy: Source(start, start + length, f'{copy}/{start}'),
                             st.integers(0, 60), st.integers(1, 12), st.integers(0, 2)), max_size=6, unique=True)
seconds = st.sets(st.integers(0, 75), min_size=1, max_size=12)


@given(sources, seconds)
def test_every_second_is_planned_once_in_the_source_where_it_is_most_centred(found, wanted):
    plan = cut_kinetics.plan_clips(found, wanted)
    planned = [second for covered in plan.values() for second in covered]
    assert len(planned) == len(set(planned))
    for source, covered in plan.items():
        start, end = cut_kinetics.clip_range(source, covered)
        assert source.start <= start < end <= source.end
        for second in covered:
            assert start <= second < end
            assert second - start >= 2 or start == source.start
            assert end - second >= 2 or end == source.end
            assert all(abs(source.start + source.end - 2 * second) <= abs(other.start + other.end - 2 * second)
                       for other in found if other.start <= second < other.end)
    assert {second for second in wanted if any(source.start <= second < source.end for source in found)} == set(planned)


@given(sources, seconds, st.sets(st.integers(0, 5)))
@settings(max_examples=200)
def test_every_second_is_in_exactly_one_clip_or_report_row(found, wanted, broken):
    failing = {source for index, source in enumerate(found) if index in broken}
    names, lost = cut_kinetics.settle_video(
        'aB_-0123456', found, wanted, lambda source, start, end: 'unreadable' if source in failing else None)
    ranges = [re.fullmatch(r'aB_-0123456_(\d{6})_(\d{6})\.mp4', name) for name in names]
    clips = pd.DataFrame([dict(clip=name[0][:-4], video='aB_-0123456', start=int(name[1]), end=int(name[2]), problem='')
                          for name in ranges], columns=['clip', 'video', 'start', 'end', 'problem'])
    asked = pd.DataFrame(dict(video='aB_-0123456', second=sorted(wanted)))
    chosen = dict(prepare_annotation.choose_clips(clips, asked)[['second', 'clip']].itertuples(index=False))
    reported = {second for _, second, reason in lost if reason}
    assert len(lost) == len(reported)
    for second in wanted:
        held = chosen.get(second)
        working = any(source.start <= second < source.end for source in found if source not in failing)
        assert (held is not None) >= working and (second in reported) == (not working)


@given(st.text('abcXYZ012_-', min_size=11, max_size=11), st.integers(0, 999_000), st.integers(1, 900))
def test_names_parse_back(video, start, length):
    name = cut_kinetics.clip_name(video, start, start + length)
    parsed = prepare_annotation.CLIP_NAME.fullmatch(name[:-4])
    assert (parsed['id'], int(parsed['start']), int(parsed['end'])) == (video, start, start + length)
    assert cut_kinetics.SOURCE_NAME.fullmatch(name)['id'] == video


@given(st.lists(st.text(max_size=60) | st.sampled_from(GOOD_LINES), max_size=6))
@settings(deadline=None)
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
    assert all(re.fullmatch('[A-Za-z0-9_-]{11}', video) for video in table.video) and table.timestamp.between(0, 1e6).all()
    people = table[table.x1.notna()]
    assert set(zip(people.video, people.timestamp.astype(int))) == {
        (video, second) for video, seconds in keyframes.items() for second in seconds}
    assert len(people) >= len([line for line in lines if line == GOOD_LINES[0]])
    assert nobody <= len(table) - len(people)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8), st.integers(0, 3))
def test_proposals_are_planned_for_keyframes_and_neighbours_within_the_clip(picked, neighbors):
    keyframes = [(f'{index:011d}_000010_000020', 10 + second) for index, second in picked]
    frames = plan_frames(keyframes, neighbors)
    assert {frame.key for frame in frames} == {f'{clip[:11]},{second + distance:04d}' for clip, second in keyframes
                           for distance in range(-neighbors, neighbors + 1) if 10 <= second + distance < 20}
    assert [frame[1:] for frame in frames] == sorted({frame[1:] for frame in frames})
