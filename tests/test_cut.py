"""Step 3 on sources of every kind: each frame of each clip is the nearest one of the source."""

import gc
import re
import struct
import subprocess
import tarfile
from fractions import Fraction

import av
import cv2
import decord
import numpy as np
import pytest

import cut_kinetics
import draw
from helpers import (
    SIZE,
    VARIANTS,
    annotation_rows,
    clip_frames,
    cut,
    errors,
    here,
    number_times,
    numbers_between,
    numbered_source,
    read_csv,
    read_report,
    run,
    snapshot,
)

# Kinetics-700 class names, with what shells and splitting at spaces stumble over
CLASSES = [
    "massaging person's head",
    'curling (sport)',
    'passing American football (not in game)',
    'zumba',
    'a; touch pwned',
    'quote "this"',
    '$(touch pwned)',
    '-dash',
    'per%cent %05d',
    'ünïcode',
]
START = 100  # seconds of the original at which every source starts


def video_id(index: int) -> str:
    return ('-{:02d}_x_AbCdE' if index % 2 else 'Zz_{:02d}-AbCdE')[:15].format(index)[:11]


@pytest.fixture(scope='module')
def matrix(tmp_path_factory):
    """All variants as one Kinetics-700 folder, cut by one command: the folder and the command's
    output.
    """
    folder = tmp_path_factory.mktemp('matrix')
    lines, rows = [], ''
    for index, variant in enumerate(VARIANTS.values()):
        path = '{}/{}_{:06d}_{:06d}.{}'.format(
            CLASSES[index % len(CLASSES)],
            video_id(index),
            START,
            START + 10,
            variant.get('suffix', 'mp4'),
        )
        numbered_source(folder / 'kinetics700/videos_train' / path, variant)
        lines.append(path + ('' if index % 3 == 0 else f' {index}'))
        # the 3rd, the 6th and the 9th second in turn, so that clips touch the source's start, its
        # middle and its end
        rows += annotation_rows(video_id(index), START + (3, 6, 9)[index % 3] + 0.01, 2)
    (folder / 'kinetics700/list.txt').write_text('\n'.join(lines) + '\n')
    (folder / 'ava_kinetics_v1_0').mkdir()
    (folder / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').write_text(rows)
    return folder, cut(folder, by=run)


def test_no_keyframe_is_lost(matrix):
    folder, done = matrix
    assert len(list((folder / 'root/videos').iterdir())) == len(VARIANTS)
    assert read_csv(folder / 'root/reports/cut_kinetics_train.csv') == [
        ['video_id', 'timestamp', 'reason']
    ]
    assert f'{len(VARIANTS)} of {len(VARIANTS)} annotated keyframes' in done.stdout
    assert not list(folder.rglob('pwned'))


@pytest.mark.parametrize('index,name', list(enumerate(VARIANTS)), ids=list(VARIANTS))
def test_every_frame_is_the_nearest(matrix, index, name):
    variant = VARIANTS[name]
    keyframe = START + (3, 6, 9)[index % 3]
    start, end = max(START, keyframe - 2), min(START + 10, keyframe + 2)
    path = matrix[0] / f'root/videos/{video_id(index)}_{start:06d}_{end:06d}.mp4'
    reader = decord.VideoReader(str(path))
    assert reader.get_avg_fps() == draw.FPS
    assert reader[0].shape[:2] == tuple(side // 2 * 2 for side in variant.get('size', SIZE)[::-1])
    numbers, times = clip_frames(path), number_times(variant)
    assert len(numbers) == (end - start) * draw.FPS
    for k, number in enumerate(numbers):
        due = start - START + k / draw.FPS
        nearest = min(abs(time - due) for time in times.values())
        assert abs(times[number] - due) <= nearest + 0.0011, (
            f'frame {k} shows {number}'
        )  # mkv counts milliseconds
    if not variant.get('drop'):
        due = keyframe - START
        slower = min(draw.FPS, Fraction(variant.get('fps', draw.FPS)))
        assert abs(times[numbers[(keyframe - start) * draw.FPS]] - due) <= 0.5 / slower + 1e-6


def test_clips_are_what_training_expects(matrix):
    for path in (matrix[0] / 'root/videos').iterdir():
        said = subprocess.run([draw.FFMPEG, '-i', str(path)], capture_output=True, text=True).stderr
        assert (
            'Video: h264' in said
            and 'yuv420p' in said
            and 'Audio' not in said
            and 'rotation' not in said
        )


@pytest.mark.parametrize('matrix_name,tagged', [('bt601', True), ('bt709', True), ('bt601', False)])
def test_colours_reach_the_frames(world, matrix_name, tagged):
    """Red, green, blue and grey of a source tagged BT.709, BT.601 or not at all are the same in the
    JPEG.
    """
    colours = [(20, 20, 220), (30, 200, 30), (210, 40, 20), (128, 128, 128)]
    image = np.hstack([np.full((96, 48, 3), colour, np.uint8) for colour in colours])
    path = world / 'kinetics700/a/aaaaaaaaaaa_000000_000010.mp4'
    path.parent.mkdir()
    tags = {'bt601': 'smpte170m', 'bt709': 'bt709'}[matrix_name]
    draw.encode(
        path,
        [image] * 90,
        30,
        (192, 96),
        options=[
            '-crf',
            '10',
            '-vf',
            f'scale=out_color_matrix={matrix_name}:out_range=limited',
            *(
                ['-colorspace', tags, '-color_primaries', tags, '-color_trc', tags]
                if tagged
                else []
            ),
        ],
    )
    make(world, {}, annotation_rows('aaaaaaaaaaa', 1), [str(path)])
    cut(world)
    here('extract_rgb_frames.py', f'--avakinetics_root={world}/root')
    frame = cv2.imread(
        str(world / 'root/rawframes/aaaaaaaaaaa_000000_000003/img_00031.jpg')
    ).astype(int)
    for index, colour in enumerate(colours):
        seen = frame[20:76, 48 * index + 12 : 48 * index + 36].mean((0, 1))
        assert abs(seen - colour).max() < 6, (colour, seen)


def test_second_run_changes_nothing(matrix):
    folder, _ = matrix
    before = snapshot(folder)
    done = cut(folder)
    assert f'0 new, {len(VARIANTS)} existing' in done.stdout
    assert snapshot(folder) == before


def make(folder, sources: dict, annotations: str, lines: list[str] | None = None):
    """A job of {path below videos_train: variant or None for a path without file}; the list names
    them all.
    """
    for path, variant in sources.items():
        if variant is not None:
            numbered_source(folder / 'kinetics700/videos_train' / path, variant)
    (folder / 'kinetics700/list.txt').write_text(
        '\n'.join(lines or [f'{path} 7' for path in sources]) + '\n'
    )
    (folder / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').write_text(annotations)


def clips(folder):
    return sorted(path.name for path in (folder / 'root/videos').iterdir())


def reasons(folder):
    return {(row[0], row[1]): row[2] for row in read_report(folder / 'root', 'cut_kinetics_train')}


def test_ranges_of_clips(world):
    """Two seconds around the keyframes, within the source."""
    make(
        world,
        {'a/aaaaaaaaaaa_000100_000110.mp4': {}, 'a/bbbbbbbbbbb_000000_000010.mp4': {}},
        annotation_rows('aaaaaaaaaaa', 104.02)
        + annotation_rows('aaaaaaaaaaa', 105.9)
        + annotation_rows('aaaaaaaaaaa', 107, 0)
        + annotation_rows('bbbbbbbbbbb', 0)
        + annotation_rows('bbbbbbbbbbb', 9),
    )
    cut(world)
    assert clips(world) == ['aaaaaaaaaaa_000102_000107.mp4', 'bbbbbbbbbbb_000000_000010.mp4']


def test_overlapping_sources(world):
    """Each gives a clip, and a broken one costs nothing.

    Step 5 takes the clip in which a keyframe is most centred.
    """
    make(
        world,
        {'a/aaaaaaaaaaa_000100_000110.mp4': {}, 'b/aaaaaaaaaaa_000103_000113.mp4': {}},
        annotation_rows('aaaaaaaaaaa', 105) + annotation_rows('aaaaaaaaaaa', 109),
    )
    cut(world)
    assert clips(world) == ['aaaaaaaaaaa_000103_000110.mp4', 'aaaaaaaaaaa_000103_000111.mp4']
    assert clip_frames(world / 'root/videos/aaaaaaaaaaa_000103_000111.mp4')[0] == 0
    for path in (world / 'root/videos').iterdir():
        path.unlink()
    (world / 'kinetics700/videos_train/b/aaaaaaaaaaa_000103_000113.mp4').write_bytes(b'no video')
    for said in ': 1 new, 0 existing', ': 0 new, 1 existing':
        done = cut(world)
        assert said in done.stdout and '2 of 2 annotated keyframes' in done.stdout
        assert clips(world) == ['aaaaaaaaaaa_000103_000110.mp4'] and not reasons(world)


def test_two_copies_of_a_source(world):
    """The second serves where the first is missing."""
    make(
        world,
        {'a/aaaaaaaaaaa_000100_000110.mp4': None, 'b/aaaaaaaaaaa_000100_000110.mp4': {}},
        annotation_rows('aaaaaaaaaaa', 105),
    )
    cut(world)
    assert clips(world) == ['aaaaaaaaaaa_000103_000107.mp4'] and not reasons(world)


def ffmpeg(*arguments) -> None:
    command = [draw.FFMPEG, '-v', 'error', '-y', *map(str, arguments)]
    subprocess.run(command, check=True)


KEY_FRAMES = ('-g', str(5 * draw.FPS))  # one every 5 s
VP8 = ('-c:v', 'libvpx', '-deadline', 'realtime', '-cpu-used', '8', '-b:v', '1M', *KEY_FRAMES)
FROM_13 = ('-ss', '13', '-t', '10')
SOUND_OF_15_S = ('-t', '10', '-f', 'lavfi', '-t', '15', '-i', 'sine', '-map', '1:a', '-c:a', 'aac')
# name -> (suffix, options before and after the input of 40 s with a key frame every 5 s, the
# seconds that the video lasts, or None where it is cut, and the first second that its clip shows)
LENGTHS = {
    'copied from the key frame before, webm': ('webm', FROM_13, (), '13.0', None),
    'copied from the key frame before, mkv': ('mkv', FROM_13, (), '13.0', None),
    'copied from the key frame before, flv': ('flv', FROM_13, (), '13.0', None),
    'copied, mp4, which says where to begin': ('mp4', FROM_13, (), None, 16),
    'never trimmed, mp4': ('mp4', (), (), '40.0', None),
    'never trimmed, avi': ('avi', (), ('-bf', '0', '-c:v', 'libx264'), '40.0', None),
    'never trimmed, no duration declared': ('mkv', (), ('-live', '1'), '40.0', None),
    'ten seconds, no duration declared': ('mkv', ('-t', '10'), ('-live', '1'), None, 3),
    'a second longer': ('mp4', ('-t', '10.9'), (), None, 3),
    'more than a second longer': ('mp4', ('-t', '11.2'), (), '11.2', None),
    'a longer sound, mp4': ('mp4', ('-t', '10'), SOUND_OF_15_S[2:], None, 3),
    'a longer sound, mkv': ('mkv', ('-t', '10'), SOUND_OF_15_S[2:], None, 3),
    'a clock that starts at an hour': ('mkv', ('-t', '10'), ('-output_ts_offset', '3600'), None, 3),
}


@pytest.mark.parametrize('archive', [False, True], ids=['list', 'archive'])
def test_sources_longer_than_their_names(tmp_path, archive):
    """They are reported, not cut.

    Copied from the key frame before, as yt-dlp does, every frame would be seconds early.
    """
    numbered_source(tmp_path / 'long.mp4', dict(seconds=40, options=(*KEY_FRAMES, '-bf', '0')))
    ffmpeg('-i', tmp_path / 'long.mp4', *VP8, tmp_path / 'long.webm')
    names, rows = [], ''
    for index, (suffix, before, after, _, _) in enumerate(LENGTHS.values()):
        source = tmp_path / f'long.{"webm" if suffix == "webm" else "mp4"}'
        inputs = [*after[:6]] if 'lavfi' in after else []
        names.append(f'length_{index:04d}_000013_000023.{suffix}')
        options = after[len(inputs) :]
        maps = ['-map', '0:v'] if inputs else []
        codec = [] if '-c:v' in options else ['-c:v', 'copy']
        ffmpeg(*before, '-i', source, *inputs, *maps, *codec, *options, tmp_path / names[-1])
        rows += annotation_rows(f'length_{index:04d}', 18)
    (tmp_path / 'kinetics_train_v1.0.csv').write_text(rows)
    (tmp_path / 'list.txt').write_text('\n'.join(names))
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        for name in names:
            tar.add(tmp_path / name, name)
    sources = f'--kinetics_archives={tmp_path}/all.tar'
    sources = sources if archive else f'--kinetics_list={tmp_path}/list.txt'
    places = f'--avakinetics_anotation={tmp_path}', f'--avakinetics_root={tmp_path}/root'
    here('cut_kinetics.py', *places, sources)
    told = {row[0]: row[2] for row in read_report(tmp_path / 'root', 'cut_kinetics_train')}
    for index, (name, (_, _, _, lasts, first)) in enumerate(LENGTHS.items()):
        video = f'length_{index:04d}'
        clip = tmp_path / f'root/videos/{video}_000016_000020.mp4'
        if lasts:
            reason = f'source too long: its name says 10 s, its video lasts {lasts} s'
            assert told.get(video) == reason and not clip.exists(), name
        else:
            assert video not in told, name
            assert clip_frames(clip) == numbers_between(first, first + 4), name


UNIT = 1 << 16
MATRICES = {  # a, b, c, d of a display matrix
    'as it is': (UNIT, 0, 0, UNIT),
    'turned 90': (0, UNIT, -UNIT, 0),
    'turned 180': (-UNIT, 0, 0, -UNIT),
    'turned 270': (0, -UNIT, UNIT, 0),
    'mirrored': (-UNIT, 0, 0, UNIT),
    'upside down': (UNIT, 0, 0, -UNIT),
    'transposed': (0, UNIT, UNIT, 0),
    'transposed the other way': (0, -UNIT, -UNIT, 0),
    'of zeros': (0, 0, 0, 0),
    'without a column': (UNIT, 0, 0, 0),
}


@pytest.mark.parametrize('off', [0, 3, -5], ids=['exact', '3 off', '-5 off'])
@pytest.mark.parametrize('name', MATRICES)
def test_frames_are_turned_as_ffmpeg_turns_them(tmp_path, name, off):
    image = np.zeros((96, 128, 3), np.uint8)
    image[:48, :64], image[:48, 64:], image[48:, :64] = (20, 20, 220), (30, 200, 30), (210, 40, 20)
    path = tmp_path / 'turned.mp4'
    draw.encode(path, [image] * 3, 30, (128, 96))
    content, plain = path.read_bytes(), struct.pack('>9i', UNIT, 0, 0, 0, UNIT, 0, 0, 0, 1 << 30)
    start = content.index(plain, content.index(b'tkhd'))
    degenerate = name in ('of zeros', 'without a column')
    a, b, c, d = (value if value or degenerate else off for value in MATRICES[name])
    matrix = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:start] + matrix + content[start + len(matrix) :])
    ffmpeg('-i', path, '-frames:v', '1', tmp_path / 'right.png')
    with av.open(str(path)) as video:
        frame = next(video.decode(video=0))
        turned = cut_kinetics.turn_upright(frame, frame.side_data.get('DISPLAYMATRIX'))
    shown = turned.to_ndarray(format='bgr24')
    np.testing.assert_array_equal(shown, cv2.imread(str(tmp_path / 'right.png')))


def test_frames_are_freed_at_once(world, monkeypatch):
    """None waits until Python's garbage collector gets its turn: a worker would grow and grow."""
    make(world, {'a/aaaaaaaaaaa_000000_000010.mp4': {}}, annotation_rows('aaaaaaaaaaa', 5))
    monkeypatch.setattr(gc, 'enable', lambda: None)  # Step 3 turns it on after its planning
    gc.collect()
    try:
        cut(world)
        found = [item for item in gc.get_objects() if isinstance(item, av.VideoFrame)]
    finally:
        monkeypatch.undo()
        gc.enable()
    assert not found


def test_frames_whose_times_run_backwards_are_reported(world):
    """H.264 with B-frames in AVI: the container has no times of presentation."""
    path = 'a/aaaaaaaaaaa_000000_000010.avi'
    make(world, {path: dict(suffix='avi', options=('-bf', '3'))}, annotation_rows('aaaaaaaaaaa', 5))
    assert 'no clip could be cut' in errors(cut(world, code=1))
    reason = reasons(world)['aaaaaaaaaaa', '5']
    assert re.fullmatch(
        r'damaged video: the times of its frames run backwards, at \d\.\d s', reason
    )
    make(world, {path: dict(suffix='avi', options=('-bf', '0'))}, annotation_rows('aaaaaaaaaaa', 5))
    cut(world)
    clip = world / 'root/videos/aaaaaaaaaaa_000003_000007.mp4'
    assert clip_frames(clip) == numbers_between(3, 7)


def test_files_beside_a_video_are_no_videos(world):
    """As yt-dlp leaves them; they cost a line of the report, and no clip."""
    make(
        world,
        {'a/aaaaaaaaaaa_000100_000110.mp4': {}},
        annotation_rows('aaaaaaaaaaa', 105),
        [f'a/aaaaaaaaaaa_000100_000110.{suffix}' for suffix in ('wav', 'json', 'mp4', 'MP4.part')],
    )
    (world / 'kinetics700/videos_train/a/aaaaaaaaaaa_000100_000110.wav').write_bytes(b'sound')
    for _ in range(2):
        assert 'malformed list line: 3' in cut(world).stdout
    assert {reason.split(': ')[0] for reason in reasons(world).values()} == {'malformed list line'}


def test_sources_that_end_early(world):
    make(
        world,
        {
            'a/aaaaaaaaaaa_000000_000010.mp4': dict(seconds=9.3),
            'a/bbbbbbbbbbb_000000_000010.mp4': dict(seconds=9.2),
            'a/ccccccccccc_000000_000010.mp4': dict(seconds=4),
            'a/ddddddddddd_000000_000010.mp4': dict(seconds=4),
        },
        annotation_rows('aaaaaaaaaaa', 9)
        + annotation_rows('bbbbbbbbbbb', 9)
        + annotation_rows('ccccccccccc', 9)
        + annotation_rows('ddddddddddd', 1),
    )
    cut(world)
    assert clips(world) == ['aaaaaaaaaaa_000007_000010.mp4', 'ddddddddddd_000000_000003.mp4']
    shown = clip_frames(world / 'root/videos/aaaaaaaaaaa_000007_000010.mp4')
    last = round(9.3 * draw.FPS) - 1
    assert shown == [*range(7 * draw.FPS, last)] + [last] * (10 * draw.FPS - last)
    assert reasons(world) == {
        ('bbbbbbbbbbb', '9'): 'source too short: it ends 0.8 s before the clip does',
        ('ccccccccccc', '9'): 'source too short: it ends 6.0 s before the clip does',
    }


def test_every_unusable_line_is_reported_with_its_number(world):
    make(
        world,
        {'a b (c)/aaaaaaaaaaa_000100_000110.mp4': {}},
        annotation_rows('aaaaaaaaaaa', 105)
        + 'aaaaaaaaaaa,105,0.1,0.2\n'
        + 'aaaaaaaaaaa,nan,0.1,0.2,0.5,0.9,3\n'
        + 'no id,105,0.1,0.2,0.5,0.9,3\n'
        + 'aaaaaaaaaaa,105,0.1,0.2,inf,0.9,3\n'
        + 'aaaaaaaaaaa,105,0.1,0.2,0.5,0.9,0\n'
        + 'aaaaaaaaaaa,105,0.1,0.2,0.5,x,3\n'
        + annotation_rows('aaaaaaaaaaa', 150)
        + annotation_rows('bbbbbbbbbbb', 3)
        + annotation_rows('ccccccccccc', 3, 0)
        + annotation_rows('ddddddddddd', 3),
        [
            'a b (c)/aaaaaaaaaaa_000100_000110.mp4',
            'a/no_name.mp4 3',
            'a/bbbbbbbbbbb_000020_000010.mp4 3',
            'a/ddddddddddd_000020_000030.mp4',
        ],
    )
    done = cut(world)
    assert (
        clips(world) == ['aaaaaaaaaaa_000103_000107.mp4']
        and '1 of 4 annotated keyframes' in done.stdout
    )
    nobody = 'no video that could be read holds this second'
    lines = (world / 'ava_kinetics_v1_0/kinetics_train_v1.0.csv').read_text().splitlines()
    listed = (world / 'kinetics700/list.txt').read_text().splitlines()
    assert read_report(world / 'root', 'cut_kinetics_train') == [
        ['aaaaaaaaaaa', '150', nobody],
        ['bbbbbbbbbbb', '3', nobody],
        ['ddddddddddd', '3', nobody],
        *(
            ['', '', f'malformed annotation: line {number}: {lines[number - 1]!r}']
            for number in range(2, 8)
        ),
        *(
            [
                '',
                '',
                f'malformed list line: line {number}: no video name like ID_000001_000011.mp4: '
                f'{listed[number - 1]!r}',
            ]
            for number in (2, 3)
        ),
    ]


def test_paths_are_found_from_every_documented_place(world):
    make(
        world,
        {'below/aaaaaaaaaaa_000100_000110.mp4': {}},
        annotation_rows('aaaaaaaaaaa', 105)
        + annotation_rows('bbbbbbbbbbb', 105)
        + annotation_rows('ccccccccccc', 105)
        + annotation_rows('ddddddddddd', 105),
        [
            'below/aaaaaaaaaaa_000100_000110.mp4 1',
            'beside/bbbbbbbbbbb_000100_000110.mp4 1',
            'here/ccccccccccc_000100_000110.mp4 1',
            f'{world}/absolute/ddddddddddd_000100_000110.mp4 1',
        ],
    )
    numbered_source(world / 'kinetics700/beside/bbbbbbbbbbb_000100_000110.mp4', {})
    numbered_source(world / 'here/ccccccccccc_000100_000110.mp4', {})
    numbered_source(world / 'absolute/ddddddddddd_000100_000110.mp4', {})
    cut(world)
    assert len(clips(world)) == 4 and not reasons(world)


def test_the_right_spelling_and_the_documented_defaults_work(world):
    make(world, {'a/aaaaaaaaaaa_000100_000110.mp4': {}}, annotation_rows('aaaaaaaaaaa', 105))
    here(
        'cut_kinetics.py',
        f'--avakinetics_annotation={world}/ava_kinetics_v1_0',
        f'--kinetics_list={world}/kinetics700/list.txt',
        f'--avakinetics_root={world}/root',
    )
    shown = run(
        'cut_kinetics.py', '--help', env={'MMACTION2': '/mm', 'PATH': '/usr/bin', 'COLUMNS': '200'}
    ).stdout
    assert (
        '/mm/data/kinetics700/kinetics700_train_list_videos.txt' in shown
        and '(default: -1, all CPUs)' in shown
    )
    assert '/mm/data/ava_kinetics)' in shown and '(default: ava_kinetics_v1_0)' in shown


def test_errors_say_what_to_do(world):
    assert 'run Step 2' in errors(cut(world, code=1))
    make(world, {'a/aaaaaaaaaaa_000100_000110.mp4': None}, annotation_rows('bbbbbbbbbbb', 105))
    assert 'names 1 videos, none of them annotated: is it of this split?' in errors(
        cut(world, code=1)
    )
    make(world, {'a/aaaaaaaaaaa_000100_000110.mp4': None}, annotation_rows('aaaaaaaaaaa', 105))
    assert 'no clip could be cut' in errors(cut(world, code=1))
    both = errors(cut(world, '--kinetics_archives', 'x.tar', code=1))
    assert both == 'error: give --kinetics_list or --kinetics_archives, not both'
    (world / 'kinetics700/list.txt').unlink()
    assert 'run Step 1' in errors(cut(world, code=1))
    (world / 'kinetics700/list.txt').mkdir()
    assert 'Is a directory' in errors(cut(world, code=1))


def test_files_without_a_usable_line(world):
    """The error says what is wrong with the first line."""
    make(
        world,
        {},
        annotation_rows('aaaaaaaaaaa', 105),
        ['a/aaaaaaaaaaa_000100_000110.mp4,7', 'a/bbbbbbbbbbb_000100_000110.mp4,7'],
    )
    message = errors(cut(world, code=1))
    assert "line 1: no video name like ID_000001_000011.mp4: 'a/aaaaaaaaaaa_000100_0001" in message
    make(world, {}, 'aaaaaaaaaaa,105,0.1,0.2,0.5\nbbbbbbbbbbb,105,0.1\n', ['x 1'])
    message = errors(cut(world, code=1))
    assert "line 1: 'aaaaaaaaaaa,105,0.1,0.2,0.5" in message and 'run Step 2' in message


@pytest.mark.parametrize('side,coder', [(480, b'cabac=0'), (482, b'cabac=1')])
def test_large_pictures_are_coded_with_cabac(world, side, coder):
    make(
        world,
        {'aaaaaaaaaaa_000100_000110.mp4': dict(size=(640, side))},
        annotation_rows('aaaaaaaaaaa', 105),
    )
    cut(world)
    assert coder in (world / 'root/videos/aaaaaaaaaaa_000103_000107.mp4').read_bytes()
