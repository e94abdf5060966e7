"""Broken and hostile input, every step: no traceback, no hang, no file outside, a reason for each,
and the good items done.

The cases stand in tables, a name each; all cases of a table go through one run together with good
items, and every case is then looked up on its own.
"""

import io
import os
import pickle
import struct
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import draw
import fetch_proposal
import prepare_annotation
import sample_world
import softlink_ava
from helpers import (
    KEYFRAME,
    TINY,
    Evil,
    annotation_rows,
    errors,
    fake_frames,
    here,
    load,
    numbered_source,
    read_csv,
    read_report,
    refused,
    run,
    snapshot,
    write_root,
)

LINE = 'aaaaaaaaaaa,5,0.1,0.2,0.5,0.9,12'


def ffmpeg(options: str) -> bytes:
    """What ffmpeg writes to a file named `-`."""
    command = [draw.FFMPEG, '-v', 'error', *options.split(), '-']
    return subprocess.run(command, capture_output=True, check=True).stdout


def made(entry, data: bytes) -> bytes:
    """What an entry of a table stands for: bytes, options of ffmpeg or a function of good data."""
    if isinstance(entry, str):
        return ffmpeg(entry)
    return entry if isinstance(entry, bytes) else entry(data)


FRAGMENTS = '-movflags frag_keyframe+empty_moov -f'  # for containers that pipes cannot hold


def huge_png_video(container: str) -> bytes:
    """A video of PNGs whose headers claim 8,000 by 8,000 pixels, which FFmpeg itself would take."""
    data = ffmpeg(f'-f lavfi -i color=s=64x64:d=10:r=1 -c:v png {FRAGMENTS} {container}')
    header = b'IHDR' + struct.pack('>II', 64, 64)
    start = data.index(header)
    claimed = b'IHDR' + struct.pack('>II', 8000, 8000) + data[start + 12 : start + 17]
    checked = claimed + struct.pack('>I', zlib.crc32(claimed))
    return data.replace(data[start : start + 21], checked)


def late_sound() -> bytes:
    """A video in whose middle a sound track begins that its header does not have."""
    data = ffmpeg('-f lavfi -i testsrc=s=64x64:d=10 -f flv')
    position = 13
    for _ in range(200):  # tags
        position += 15 + int.from_bytes(data[position + 1 : position + 4], 'big')
    tag = b'\x08' + (2).to_bytes(3, 'big') + bytes(7) + b'\x2f\xff'
    return data[:position] + tag + struct.pack('>I', len(tag)) + data[position:]


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> bytes:
    """A good source of ten seconds, its index at the end as ffmpeg writes it."""
    path = tmp_path_factory.mktemp('whole') / 'whole.mp4'
    numbered_source(path, {})
    return path.read_bytes()


def faststart(data: bytes) -> bytes:
    """The same video with its index first."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / 'before.mp4', Path(folder) / 'after.mp4'
        before.write_bytes(data)
        options = ['-v', 'error', '-i', before, '-c', 'copy', '-movflags', '+faststart', after]
        subprocess.run([draw.FFMPEG, *options], check=True)
        return after.read_bytes()


def shuffled(data: bytes) -> bytes:
    """The same file with 300 bytes of its pictures changed."""
    spoilt, rng = bytearray(data), np.random.default_rng(0)
    for position in rng.integers(200, len(data) * 2 // 3, 300):
        spoilt[position] ^= int(rng.integers(1, 256))
    return bytes(spoilt)


UNREADABLE, SHORT, DAMAGED = 'unreadable video: ', 'source too short: ', 'damaged video: '
# name -> (see `made`, how the reason starts; None where it is to be cut)
VIDEOS = {
    'good': (lambda data: data, None),
    'empty': (b'', UNREADABLE),
    'one byte': (b'\0', UNREADABLE),
    'text': (b'this is no video\n' * 1000, UNREADABLE),
    'web page': (b'<!DOCTYPE html><html><body>Video unavailable</body></html>', UNREADABLE),
    'random': (np.random.default_rng(0).bytes(100_000), UNREADABLE),
    **{
        f'truncated at {share} %': (
            lambda data, share=share: data[: len(data) * share // 100],
            UNREADABLE,
        )
        for share in (1, 10, 50, 90, 99)
    },
    **{
        f'index first, truncated at {share} %': (
            lambda data, share=share: faststart(data)[: len(data) * share // 100],
            reason,
        )
        for share, reason in ((3, UNREADABLE), (30, DAMAGED), (60, DAMAGED), (98, DAMAGED))
    },
    'bytes changed': (shuffled, DAMAGED),
    'unknown codec': (lambda data: data.replace(b'avc1', b'zzzz'), UNREADABLE),
    'picture': (cv2.imencode('.jpg', np.zeros((90, 120, 3), np.uint8))[1].tobytes(), UNREADABLE),
    'sound only': ('-f lavfi -i sine=d=10 -f matroska', UNREADABLE),
    'no frames': ('-f lavfi -i color=s=64x64:d=1 -c:v libx264 -frames:v 0 -f matroska', UNREADABLE),
    'one frame': ('-f lavfi -i color=s=64x64:d=1 -c:v libx264 -frames:v 1 -f matroska', SHORT),
    'huge pictures claimed': (
        lambda data: huge_png_video('matroska'),
        UNREADABLE + 'Picture size 8000x8000 exceeds',
    ),
    'playlist of another file': (
        b'ffconcat version 1.0\nfile vids-00000x_000000_000010.mp4\n',
        UNREADABLE,
    ),
    'playlist of itself': (
        b'ffconcat version 1.0\nfile vids-00020x_000000_000010.mp4\n',
        UNREADABLE,
    ),
    'web playlist': (b'#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n', UNREADABLE),
    'subtitles': (b'1\n00:00:00,000 --> 00:00:10,000\nhello\n', UNREADABLE),
    'Matroska named mp4': ('-f lavfi -i testsrc=s=64x64:d=10 -c:v libx264 -f matroska', None),
    'one pixel high': (
        '-f lavfi -i testsrc=s=64x2:d=10 -vf crop=64:1:0:0 -c:v ffv1 -f matroska',
        UNREADABLE,
    ),
    'starts after an hour': (
        '-f lavfi -i testsrc=s=64x64:d=10 -c:v libx264 -output_ts_offset 3600 -f matroska',
        None,
    ),
    'sound begins in the middle': (lambda data: late_sound(), DAMAGED),
    'time runs a thousand times too fast': (
        '-f lavfi -i testsrc=s=64x64:d=10 -vf setpts=PTS*1000 -fps_mode passthrough -c:v libx264 '
        '-f matroska',
        'source too long: its name says 10 s, its video lasts 99',
    ),
}


@pytest.fixture(scope='module')
def cut_videos(whole, tmp_path_factory):
    """All sources above, and files that are none, through one run of Step 3: its folder and reasons
    by video.
    """
    folder = tmp_path_factory.mktemp('videos')
    sources = folder / 'kinetics700/videos_train/x'
    sources.mkdir(parents=True)
    (folder / 'secret.mp4').write_bytes(whole)
    names = [*VIDEOS, *NO_FILES]
    for index, (entry, _) in enumerate(VIDEOS.values()):
        (sources / f'vids-{index:05d}x_000000_000010.mp4').write_bytes(made(entry, whole))
    for index, make in enumerate(NO_FILES.values(), len(VIDEOS)):
        make(sources / f'vids-{index:05d}x_000000_000010.mp4')
    (folder / 'kinetics_train_v1.0.csv').write_text(
        ''.join(annotation_rows(f'vids-{i:05d}x', 8) for i in range(len(names)))
    )
    (folder / 'kinetics700/list.txt').write_text(
        ''.join(f'x/vids-{i:05d}x_000000_000010.mp4 7\n' for i in range(len(names)))
    )
    before = snapshot(folder)
    run(
        'cut_kinetics.py',
        f'--avakinetics_anotation={folder}',
        f'--kinetics_list={folder}/kinetics700/list.txt',
        f'--avakinetics_root={folder}/root',
        cwd=folder,
    )
    assert {
        name: value for name, value in snapshot(folder).items() if not name.startswith('root/')
    } == before
    rows = read_report(folder / 'root', 'cut_kinetics_train')
    return folder, {names[int(row[0][5:10])]: row[2] for row in rows}


NO_FILES = {
    'folder': lambda path: path.mkdir(),
    'link to itself': lambda path: path.symlink_to(path),
    'link to nothing': lambda path: path.symlink_to('/nonexistent'),
    'pipe': os.mkfifo,
    'device': lambda path: path.symlink_to('/dev/zero'),
    'missing': lambda path: None,
}


@pytest.mark.parametrize('name', VIDEOS)
def test_videos(cut_videos, name):
    folder, reasons = cut_videos
    clip, expected = (
        folder / f'root/videos/vids-{[*VIDEOS].index(name):05d}x_000006_000010.mp4',
        VIDEOS[name][1],
    )
    if expected is None:
        assert name not in reasons and clip.is_file()
    else:
        assert (
            reasons[name].startswith(expected) and '\n' not in reasons[name] and not clip.exists()
        )


@pytest.mark.parametrize('name', NO_FILES)
def test_what_is_no_file(cut_videos, name):
    assert cut_videos[1][name].startswith('file missing: ')


ANNOTATIONS = {  # name -> (line, whether it is one); None: it is no line at all
    'good': (LINE, True),
    'byte order mark': ('\ufeff' + LINE, True),
    'carriage return': (LINE + '\r', True),
    'no people': ('aaaaaaaaaaa,6', True),
    'no people at the start': ('aaaaaaaaaaa,0', True),
    'no people, with commas': ('aaaaaaaaaaa,6,,,,,', True),
    'no people, not available': ('aaaaaaaaaaa,6,NA,NA,NA,NA,NA', False),
    'no line': ('', None),
    'white space': (' \t ', None),
    'NaN time': (LINE.replace(',5,', ',nan,'), False),
    'infinite time': (LINE.replace(',5,', ',inf,'), False),
    'negative time': (LINE.replace(',5,', ',-5,'), False),
    'time beyond six digits': (LINE.replace(',5,', ',1000000,'), False),
    'NaN box': (LINE.replace('0.5', 'NaN'), False),
    'infinite box': (LINE.replace('0.9', '1e999'), False),
    'negative box': (LINE.replace('0.1', '-0.1'), False),
    'box in pixels': (LINE.replace('0.9', '240'), False),
    'reversed box': (LINE.replace('0.1', '0.6'), False),
    'empty box': (LINE.replace('0.1', '0.5'), False),
    'cut off': ('aaaaaaaaaaa,5.005,', False),
    'columns missing': ('aaaaaaaaaaa,5,0.1,0.2,0.5', False),
    'columns too many': (LINE + ',1', False),
    'one column': ('aaaaaaaaaaa', False),
    'empty fields': (',,,,,,', False),
    'action 0': (LINE[:-2] + '0', False),
    'action 81, of other classes': (LINE[:-2] + '81', True),
    'action of a half': (LINE[:-2] + '1.5', False),
    'action not a number': (LINE[:-2] + 'run', False),
    'climbing id': ('../../../../x,5,0.1,0.2,0.5,0.9,12', False),
    'absolute id': ('/etc/passwd,5,0.1,0.2,0.5,0.9,12', False),
    'id with a slash': ('aaaaa/aaaaa,5,0.1,0.2,0.5,0.9,12', False),
    'id with a NUL': ('aaaaa\0aaaaa,5,0.1,0.2,0.5,0.9,12', False),
    'short id': ('a,5,0.1,0.2,0.5,0.9,12', 'another video'),
    'id of 65 characters': ('a' * 65 + ',5,0.1,0.2,0.5,0.9,12', False),
    'other digits': (LINE.replace('aaaaaaaaaaa', '１２３４５６７８９０１'), False),
    'a million characters': ('x' * 1_000_000, False),
    'a million columns': (',' * 1_000_000, False),
    'not UTF-8': (b'\xff\xfe\xfa,5,0.1,0.2,0.5,0.9,12', False),
    'UTF-16': (LINE.encode('utf-16'), False),
    'html': ('<html>', False),
    'header': ('video_id,timestamp,x1,y1,x2,y2,action', False),
    'formula': ('=cmd|" /C calc"!A0,5,0.1,0.2,0.5,0.9,12', False),
    'surrogate': (b'\xed\xa0\x80aaaaaaaa,5', False),
}


@pytest.fixture(scope='module')
def annotated(whole, tmp_path_factory):
    """All lines above through Steps 3 and 5: by step, which lines were reported."""
    folder = tmp_path_factory.mktemp('annotated')
    (folder / 'aaaaaaaaaaa_000000_000010.mp4').write_bytes(whole)
    (folder / 'list.txt').write_text('aaaaaaaaaaa_000000_000010.mp4\n')
    lines = [line.encode() if isinstance(line, str) else line for line, _ in ANNOTATIONS.values()]
    (folder / 'kinetics_train_v1.0.csv').write_bytes(
        b'\n'.join([lines[1], *lines[:1], *lines[2:]]) + b'\n'
    )  # BOM comes first
    reported = {}
    for step, options in (
        ('cut_kinetics', [f'--kinetics_list={folder}/list.txt']),
        ('prepare_annotation', []),
    ):
        here(
            f'{step}.py',
            f'--avakinetics_anotation={folder}',
            f'--avakinetics_root={folder}/root',
            *options,
            cwd=folder,
        )
        reported[step] = {
            int(row[2].split('line ')[1].split(':')[0]): row[2]
            for row in read_report(folder / 'root', f'{step}_train')
            if 'malformed' in row[2]
        }
    assert (folder / 'root/videos/aaaaaaaaaaa_000003_000007.mp4').is_file()
    good = sum(value is True and 'people' not in name for name, (_, value) in ANNOTATIONS.items())
    assert len(read_csv(folder / 'root/kinetics_train.csv')) == good
    assert sorted(path.name for path in folder.iterdir()) == [
        'aaaaaaaaaaa_000000_000010.mp4',
        'kinetics_train_v1.0.csv',
        'list.txt',
        'root',
    ]
    return reported


@pytest.mark.parametrize('step', ['cut_kinetics', 'prepare_annotation'])
@pytest.mark.parametrize('name', ANNOTATIONS)
def test_annotation_lines(annotated, name, step):
    names = list(ANNOTATIONS)
    names[:2] = names[1::-1]
    number = names.index(name) + 1
    assert (number in annotated[step]) == (ANNOTATIONS[name][1] is False)
    assert all(len(reason) < 300 for reason in annotated[step].values())


def test_annotation_lines_in_any_company(tmp_path):
    """A line is judged alike before and after any other."""
    path = tmp_path / 'annotations.csv'
    for name, (line, good) in ANNOTATIONS.items():
        data = line.encode() if isinstance(line, str) else line
        for lines in (data, LINE.encode()), (LINE.encode(), data):
            path.write_bytes(b'\n'.join(lines) + b'\n')
            if lines[0] == data or name not in ('byte order mark', 'UTF-16'):  # which come first
                annotations, malformed = prepare_annotation.read_annotations(path)
                assert len(annotations) == 1 + (good in (True, 'another video')), name
                assert len(malformed) == (good is False), name


# name -> (line, whether it is malformed; if not, there is no such file, but for the good one)
LIST_LINES = {
    'climbing': ('../../../aaaaaaaaaaa_000000_000010.mp4', False),
    'absolute': ('/etc/aaaaaaaaaaa_000000_000010.mp4 3', False),
    'no id': ('../../x 3', True),
    'passwd': ('/etc/passwd', True),
    'NUL': ('a\0b/aaaaaaaaaaa_000000_000010.mp4 3', False),
    'ends before it starts': ('aaaaaaaaaaa_000010_000000.mp4 3', True),
    'no range': ('aaaaaaaaaaa.mp4 3', True),
    'label only': ('3', True),
    'a million characters': ('x' * 1_000_000 + '/aaaaaaaaaaa_000000_000010.mp4', False),
    'a name of 300 characters': ('x' * 300 + '/aaaaaaaaaaa_000000_000010.mp4 3', False),
    'not UTF-8': (b'\xff/aaaaaaaaaaa_000000_000010.mp4', False),
    'option': ('-rf/aaaaaaaaaaa_000000_000010.mp4 3', False),
    'shell': ('$(touch pwned)/aaaaaaaaaaa_000000_000010.mp4', False),
    'other digits': ('aaaaaaaaaaa_٠٠٠٠٠٠_٠٠٠٠١٠.mp4 3', True),
    'range of a month': ('aaaaaaaaaaa_000000_999999.mp4 3', False),
    'web address': ('http://127.0.0.1:9/aaaaaaaaaaa_000000_000010.mp4 3', False),
    'protocol of ffmpeg': ('concat:a.mp4|b/aaaaaaaaaaa_000000_000010.mp4 3', False),
    'good': ('good/aaaaaaaaaaa_000000_000010.mp4 3', False),
}


def test_list_lines(whole, tmp_path):
    (tmp_path / 'good').mkdir()
    (tmp_path / 'good/aaaaaaaaaaa_000000_000010.mp4').write_bytes(whole)
    (tmp_path / 'kinetics_train_v1.0.csv').write_text(LINE + '\n')
    lines = [line.encode() if isinstance(line, str) else line for line, _ in LIST_LINES.values()]
    (tmp_path / 'list.txt').write_bytes(b'\n'.join(lines))
    here(
        'cut_kinetics.py',
        f'--avakinetics_anotation={tmp_path}',
        f'--kinetics_list={tmp_path}/list.txt',
        f'--avakinetics_root={tmp_path}/root',
        cwd=tmp_path,
    )
    assert [path.name for path in (tmp_path / 'root/videos').iterdir()] == [
        'aaaaaaaaaaa_000003_000007.mp4'
    ]
    numbers = [
        int(row[2].split('line ')[2].split(':')[0])
        if row[2].count('line ') > 1
        else int(row[2].split('line ')[1].split(':')[0])
        for row in read_report(tmp_path / 'root', 'cut_kinetics_train')
    ]
    names = list(LIST_LINES)
    expected = {name for name, (_, malformed) in LIST_LINES.items() if malformed}
    assert {names[number - 1] for number in numbers} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'good',
        'kinetics_train_v1.0.csv',
        'list.txt',
        'root',
    ]


def member(name: str, content: bytes = b'', **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


NAME = 'aaaaaaaaaaa_000000_000010.mp4'
MEMBERS = {
    'absolute': member('/tmp/' + NAME, b'x'),
    'climbing': member('../../' + NAME, b'x'),
    'climbing in the middle': member('a/../../../' + NAME, b'x'),
    'symbolic link': member('a/' + NAME, type=tarfile.SYMTYPE, linkname='/etc/passwd'),
    'hard link': member('a/' + NAME, type=tarfile.LNKTYPE, linkname='../../etc/passwd'),
    'device': member('a/' + NAME, type=tarfile.CHRTYPE),
    'pipe': member('a/' + NAME, type=tarfile.FIFOTYPE),
    'folder': member('a/' + NAME, type=tarfile.DIRTYPE),
    'newline': member('a\nb/' + NAME.replace('aaaaaaaaaaa', 'bbbbbbbbbbb'), b'x'),
    'no video': member('a/' + NAME.replace('aaaaaaaaaaa', 'ccccccccccc'), b'no video'),
    'empty': member('a/' + NAME.replace('aaaaaaaaaaa', 'ddddddddddd')),
}


@pytest.mark.parametrize('name', MEMBERS)
def test_archive_members(whole, tmp_path, name):
    with tarfile.open(tmp_path / '1.tar', 'w') as tar:
        for info, content in MEMBERS[name], member('good/' + NAME, whole):
            tar.addfile(info, io.BytesIO(content))
    cut_members(tmp_path, tmp_path / '1.tar')
    assert [path.name for path in (tmp_path / 'root/videos').iterdir()] == [
        'aaaaaaaaaaa_000003_000007.mp4'
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        '1.tar',
        'kinetics_train_v1.0.csv',
        'root',
    ]
    assert not list((tmp_path / 'root').rglob('*_000000_000010.mp4'))
    assert not any((folder / NAME).exists() for folder in (Path('/tmp'), *tmp_path.parents))


def cut_members(folder: Path, *archives, **options) -> subprocess.CompletedProcess:
    (folder / 'kinetics_train_v1.0.csv').write_text(
        ''.join(LINE.replace('a' * 11, letter * 11) + '\n' for letter in 'abcd')
    )
    return here(
        'cut_kinetics.py',
        f'--avakinetics_anotation={folder}',
        f'--avakinetics_root={folder}/root',
        '--kinetics_archives',
        *archives,
        cwd=folder,
        **options,
    )


def sparse_archive() -> bytes:
    """A member in GNU's sparse format: 64 GB of zeros in a file of a few hundred bytes."""
    info = tarfile.TarInfo('a/' + NAME)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    buffer = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    buffer[386:410] = b'00000000000\0' + b'00000001000\0'
    buffer[483:495] = b'\x80' + (2**36).to_bytes(11, 'big')
    buffer[148:156] = b'        '
    buffer[148:156] = b'%06o\0 ' % sum(buffer)
    return bytes(buffer) + bytes(512 * 3)


def test_archives_that_claim_more_than_there_is(whole, tmp_path):
    (tmp_path / 'sparse.tar').write_bytes(sparse_archive())
    claimed = tarfile.TarInfo('a/' + NAME.replace('aaaaaaaaaaa', 'bbbbbbbbbbb'))
    claimed.size = 2**36
    (tmp_path / 'claims.tar').write_bytes(claimed.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
    with tarfile.open(tmp_path / 'good.tar', 'w') as tar:
        info, data = member('good/' + NAME, whole)
        tar.addfile(info, io.BytesIO(data))
    archives = [tmp_path / f'{name}.tar' for name in ('sparse', 'claims', 'good')]
    cut_members(tmp_path, *archives, code=1)
    assert [path.name for path in (tmp_path / 'root/videos').iterdir()] == [
        'aaaaaaaaaaa_000003_000007.mp4'
    ]
    rows = {row[0]: row[2] for row in read_report(tmp_path / 'root', 'cut_kinetics_train')}
    assert (
        rows['b' * 11] == 'no video that could be read holds this second'
        and 'claims.tar' in rows['']
    )


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'no archive' * 100,
        b'\x1f\x8b' + b'broken' * 100,
        bytes(10_000),
        b'BZh91AY&SY' + bytes(100),
        np.random.default_rng(0).bytes(512 * 100),
    ],
    ids=['empty', 'text', 'broken gzip', 'zeros', 'broken bzip2', 'random'],
)
def test_what_is_no_archive(whole, tmp_path, content):
    (tmp_path / 'bad.tar').write_bytes(content)
    with tarfile.open(tmp_path / 'good.tar', 'w') as tar:
        tar.addfile(tarfile.TarInfo('empty'))
        info, data = member('good/' + NAME, whole)
        tar.addfile(info, io.BytesIO(data))
    (tmp_path / 'loop.tar').symlink_to(tmp_path / 'loop.tar')
    cut_members(
        tmp_path,
        tmp_path / 'bad.tar',
        tmp_path / 'good.tar',
        tmp_path / 'loop.tar',
        tmp_path,
        code=1,
    )
    assert [path.name for path in (tmp_path / 'root/videos').iterdir()] == [
        'aaaaaaaaaaa_000003_000007.mp4'
    ]
    said = '\n'.join(row[2] for row in read_report(tmp_path / 'root', 'cut_kinetics_train'))
    assert 'loop.tar' in said and 'bad.tar' in said


CLIPS = {  # name -> see `made`
    'empty': b'',
    'text': b'no video',
    'truncated early': lambda data: data[:2000],
    'truncated late': lambda data: data[:-500],
    'sound only': f'-f lavfi -i sine=d=4 -c:a aac {FRAGMENTS} mp4',
    'playlist': b"ffconcat version 1.0\nfile 'good-clip-0_000000_000004.mp4'\n",
    'Matroska': f'-f lavfi -i testsrc=s=64x64:d=4:r={draw.FPS} -c:v libx264 -f matroska',
    'wrong length': f'-f lavfi -i testsrc=s=64x64:d=3:r={draw.FPS} -c:v libx264 {FRAGMENTS} mp4',
    'huge pictures claimed': lambda data: huge_png_video('mov'),
    'random': np.random.default_rng(1).bytes(50_000),
}


@pytest.mark.parametrize('name', CLIPS)
def test_frames_of_clips(tmp_path, name):
    """Step 6 reads keyframes out of clips that have no raw frames."""
    clip, good = 'bad-clip--1_000000_000004', tmp_path / 'videos/good-clip-0_000000_000004.mp4'
    numbered_source(good, dict(seconds=4))
    (tmp_path / f'videos/{clip}.mp4').write_bytes(made(CLIPS[name], good.read_bytes()))
    with pytest.raises(ValueError, match=f'frame {3 * draw.FPS + 1} of'):
        keyframe = fetch_proposal.Keyframe(fetch_proposal.parse_clip(clip), 3)
        frame = fetch_proposal.Frame(keyframe, f'videos/{clip}.mp4', 0)
        fetch_proposal.read_frame(tmp_path, frame)


@pytest.mark.parametrize('name', CLIPS)
def test_clips(tmp_path, name):
    """A broken clip costs itself in Step 4, and in Steps 5 and 6 where they read clips."""
    videos = tmp_path / 'videos'
    numbered_source(videos / 'good-clip-0_000000_000004.mp4', dict(seconds=4))
    bad = videos / 'bad-clip--1_000000_000004.mp4'
    bad.write_bytes(made(CLIPS[name], (videos / 'good-clip-0_000000_000004.mp4').read_bytes()))
    (videos / 'loop-clip-2_000000_000004.mp4').symlink_to('loop-clip-2_000000_000004.mp4')
    (videos / 'fold-clip-3_000000_000004.mp4').mkdir()
    (videos / 'new\nline.mp4').write_bytes(b'')
    (tmp_path / 'kinetics_train_v1.0.csv').write_text(
        ''.join(
            LINE.replace('a' * 11, video).replace(',5,', ',2,') + '\n'
            for video in ('good-clip-0', 'bad-clip--1', 'loop-clip-2', 'fold-clip-3')
        )
    )
    here(
        'prepare_annotation.py',
        f'--avakinetics_anotation={tmp_path}',
        f'--avakinetics_root={tmp_path}',
    )
    assert {row[0] for row in read_csv(tmp_path / 'kinetics_train.csv')} == {
        'good-clip-0_000000_000004'
    }
    here('extract_rgb_frames.py', f'--avakinetics_root={tmp_path}')
    assert [path.name for path in (tmp_path / 'rawframes').iterdir()] == [
        'good-clip-0_000000_000004'
    ]
    rows = dict(read_report(tmp_path, 'extract_rgb_frames'))
    assert rows['bad-clip--1_000000_000004'].split(':')[0] in (
        'unreadable clip',
        'wrong number of frames',
    )
    assert rows['loop-clip-2_000000_000004'].startswith('unreadable clip')
    assert 'new\nline.mp4' not in rows


def test_folders_of_frames(tmp_path):
    """Step 5 on what may lie in rawframes/ beside good folders."""
    frames = tmp_path / 'rawframes'
    fake_frames(frames, 'aaaaaaaaaaa_000003_000007')
    (frames / 'bbbbbbbbbbb_000003_000007').symlink_to('bbbbbbbbbbb_000003_000007')
    (frames / 'ccccccccccc_000003_000007').write_text('a file')
    (frames / 'ddddddddddd_000003_000007').mkdir()
    (frames / 'eeeeeeeeeee_000007_000003').mkdir()
    (frames / 'fffffffffff_٠٠٠٠٠٣_٠٠٠٠٠٧').mkdir()
    (frames / 'new\nline').mkdir()
    (frames / os.fsdecode(b'\xff\xfe')).mkdir()
    (tmp_path / 'kinetics_train_v1.0.csv').write_text(
        ''.join(LINE.replace('a' * 11, letter * 11) + '\n' for letter in 'abcdef')
    )
    here(
        'prepare_annotation.py',
        f'--avakinetics_anotation={tmp_path}',
        f'--avakinetics_root={tmp_path}',
    )
    assert [row[0] for row in read_csv(tmp_path / 'kinetics_train.csv')] == [
        'aaaaaaaaaaa_000003_000007'
    ]
    reasons = {
        row[0][0]: row[2].split(':')[0] for row in read_report(tmp_path, 'prepare_annotation_train')
    }
    assert reasons == {
        'b': 'unreadable frames',
        'c': 'unreadable frames',
        'd': 'frames missing or empty',
        'e': 'no clip holds this keyframe',
        'f': 'no clip holds this keyframe',
    }


def test_a_clip_whose_track_has_a_name_that_is_no_utf8(tmp_path):
    clip = tmp_path / 'videos/good-clip-0_000000_000004.mp4'
    numbered_source(clip, dict(seconds=4))
    clip.write_bytes(clip.read_bytes().replace(b'VideoHandler', b'VideoHandl\xff\xfe'))
    named = prepare_annotation.Clip(clip.stem, 'good-clip-0', 0, 4)
    assert prepare_annotation.check_clip(named, tmp_path).error.startswith('unreadable clip: ')


def huge_jpeg(data: bytes) -> bytes:
    """A JPEG whose header claims 65,500 by 65,500 pixels."""
    start = data.index(b'\xff\xc0')
    return data[: start + 5] + struct.pack('>HH', 65500, 65500) + data[start + 9 :]


def as_png(data: bytes) -> bytes:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return cv2.imencode('.png', image)[1].tobytes()


FRAMES = {  # name -> see `made`; None: there is no file
    'missing': None,
    'empty': b'',
    'text': b'no picture',
    'no picture but its end': b'x\xff\xd9',
    'truncated early': lambda data: data[:100],
    'truncated late': lambda data: data[:-3],
    'huge pictures claimed': huge_jpeg,
    'random': np.random.default_rng(0).bytes(9000) + b'\xff\xd9',
    'PNG': as_png,
}
ROWS = [
    '',
    ',',
    'x',
    'scene-00000_000010_000014,12',
    'scene-00000_000010_000014,nan,0,0,1,1,12,-1',
    '../../x,12,0,0,1,1,12,-1',
    'scene-00000_000010_000014,12,nan,0,1,1,12,-1',
    'x' * 1_000_000,
    'scene-00000_000010_000014,12,0,0,1,1,twelve,-1',
    '\0',
    '"a\nb"',
]


@pytest.fixture(scope='module')
def fetched(tmp_path_factory):
    """Step 6 on a good clip and a clip for each broken frame above."""
    root = write_root(tmp_path_factory.mktemp('fetched'), range(len(FRAMES) + 1))
    for scene, entry in enumerate(FRAMES.values(), 1):
        frame = root / f'rawframes/scene-{scene:05d}_000010_000014/{KEYFRAME}'
        if entry is None:
            frame.unlink()
        else:
            frame.write_bytes(made(entry, frame.read_bytes()))
    here('fetch_proposal.py', f'--avakinetics_root={root}', *TINY, '--neighbors=0')
    return root, read_report(root, 'fetch_proposal_train')


@pytest.mark.parametrize('name', FRAMES)
def test_frames(fetched, name):
    root, rows = fetched
    reasons = {row[0]: row[2] for row in rows}
    assert reasons[f'scene-{[*FRAMES].index(name) + 1:05d}'].startswith('unreadable frame: ')
    assert load(root / 'kinetics_proposal.pkl').keys() == {'scene-00000,0012'}


@pytest.mark.parametrize('row', ROWS)
def test_rows(fetched, tmp_path, row):
    """What Step 5 did not write is refused, by the number of its line."""
    rows = (fetched[0] / 'kinetics_train.csv').read_text().splitlines()
    (tmp_path / 'list.csv').write_text('\n'.join([*rows[:2], row, *rows[2:]]))
    place = f'--avakinetics_root={fetched[0]}', f'--picklepath={tmp_path}/x.pkl'
    message = refused('fetch_proposal.py', *place, f'--datalist={tmp_path}/list.csv', *TINY)
    assert (
        message
        == f'error: line 3 of {tmp_path}/list.csv was not written by Step 5; run Step 5 again'
    )


CONFIGS = {
    'does not parse': 'model = dict(',
    'raises': 'raise SystemError("no")',
    'no model': 'x = 1',
    'empty': '',
    'unknown detector': "model = dict(type='NoSuchDetector')",
    'no base': "_base_ = 'nowhere.py'",
    'binary': '\0\1\2',
    'base of itself': "_base_ = 'config.py'",
    'no pipeline': "model = dict(type='FasterRCNN')",
}


@pytest.mark.parametrize('name', CONFIGS)
def test_configs(fetched, tmp_path, name):
    (tmp_path / 'config.py').write_text(CONFIGS[name])
    message = refused(
        'fetch_proposal.py',
        f'--avakinetics_root={fetched[0]}',
        f'--picklepath={tmp_path}/x.pkl',
        f'--config={tmp_path}/config.py',
        TINY[1],
    )
    assert f'{tmp_path}/config.py' in message


def saved(value) -> bytes:
    """What torch.save writes."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


OTHER_WEIGHTS = saved(dict(state_dict={'a': torch.zeros(1)}))
CHECKPOINTS = {
    'code': saved(Evil()),
    'code in a plain pickle': pickle.dumps(Evil()),
    'other weights': OTHER_WEIGHTS,
    'truncated': OTHER_WEIGHTS[: len(OTHER_WEIGHTS) // 2],
    'a list': pickle.dumps([1]),
    'empty': b'',
}


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoints(fetched, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x.pth').write_bytes(CHECKPOINTS[name])
    message = refused(
        'fetch_proposal.py',
        f'--avakinetics_root={fetched[0]}',
        f'--picklepath={tmp_path}/x.pkl',
        TINY[0],
        f'--checkpoint={tmp_path}/x.pth',
    )
    assert f'{tmp_path}/x.pth' in message and not (tmp_path / 'pwned').exists()


KEY = b'\x8c\x10aaaaaaaaaaa,0005'
PICKLES = {
    'code': pickle.dumps(Evil()),
    'code as a value': pickle.dumps({'aaaaaaaaaaa,0005': Evil()}),
    'code by eval': b'cbuiltins\neval\n(S"1"\ntR.',
    'code in an array of objects': pickle.dumps({'a': np.array([Evil()], object)}),
    'code by a name of a name': b'\x80\x04\x8c\x05numpy\x8c\x0ecore._internal\x93.',
    'module': b'cos\nsystem\n.',
    'numpy function': b'cnumpy\nload\n(S"x"\ntR.',
    'list': pickle.dumps([1]),
    'no array': pickle.dumps({'aaaaaaaaaaa,0005': 'boxes'}),
    'empty': b'',
    'only a stop': b'\x80\x04.',
    'truncated': pickle.dumps({1: 2})[:-1],
    'text': b'no pickle at all\n',
    'memory for the memo': b'\x80\x04}\x94]r\xff\xff\xff\x7f.',
    'a terabyte of bytes': b'\x80\x04\x8e' + (2**40).to_bytes(8, 'little') + b'x.',
    'frame of a terabyte': b'\x80\x04\x95' + (2**40).to_bytes(8, 'little') + b'}.',
    'ten million marks': b'\x80\x04' + b'(' * 10**7 + b'.',
    'huge array claimed': b'\x80\x04}'
    + KEY
    + b'cnumpy\nndarray\n(\x8a\x06\0\0\0\0\0\x01K\x05\x86\x8c\x02f8tRs.',
    'number of two gigabytes': b'\x80\x04\x8b' + (2**31 - 1).to_bytes(4, 'little') + b'1.',
}


@pytest.fixture
def merging(tmp_path):
    root = tmp_path / 'root'
    (root / 'annotations').mkdir(parents=True)
    (root / 'annotations/ava_train_v2.2.csv').write_text(
        '-5KQ66BBWC4,0902,0.100,0.200,0.300,0.400,12,0\n'
    )
    (root / 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl').write_bytes(
        sample_world.fair_pickle({'-5KQ66BBWC4,0902': np.ones((1, 5))})
    )
    (root / 'kinetics_train.csv').write_text(
        'aaaaaaaaaaa_000103_000107,105,0.100,0.200,0.500,0.900,12,-1\n'
    )
    (root / 'kinetics_proposal.pkl').write_bytes(
        pickle.dumps({'aaaaaaaaaaa,0105': np.ones((1, 5))})
    )
    return root


@pytest.mark.parametrize(
    'which', ['kinetics_proposal.pkl', 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl']
)
@pytest.mark.parametrize('name', PICKLES)
def test_pickles(merging, tmp_path, name, which):
    (merging / which).write_bytes(PICKLES[name])
    before = snapshot(merging)
    message = errors(
        run('merge_annotations.py', f'--avakinetics_root={merging}', code=1, cwd=tmp_path)
    )
    assert 'is no pickle of proposals' in message and which in message
    assert snapshot(merging) == before and not (tmp_path / 'pwned').exists()


MERGED_ROWS = [
    '',
    'x',
    ',,,,,,,',
    '../../x,105,0,0,1,1,12,-1',
    'aaaaaaaaaaa_000103_000107,x,0,0,1,1,12,-1',
    'aaaaaaaaaaa_000103_000107,105,nan,0,1,1,12,-1',
    'aaaaaaaaaaa_000103_000107,105,0,0,1,1,12',
    'x' * 1_000_000,
    'aaaaaaaaaaa_000103_000107,105,0,0,1,1,1e9,-1',
    '\0',
    '\ufeff',
    'aaaaaaaaaaa_000103_000107,105.0,0,0,1,1,12,-1',
    'aaaaaaaaaaa_000103_000107,105,0,0,1,1,12,-1,"x',
    'aaaaaaaaaaa_000103_000107,1_05,0,0,1,1,12,-1',
]


@pytest.mark.parametrize('row', MERGED_ROWS)
def test_rows_to_merge(merging, row):
    """They are refused, by the number of the line."""
    with open(merging / 'kinetics_train.csv', 'a') as file:
        file.write(row + '\n')
    before = snapshot(merging)
    message = errors(run('merge_annotations.py', f'--avakinetics_root={merging}', code=1))
    assert f'line 2 of {merging}/kinetics_train.csv is no annotation' in message
    assert snapshot(merging) == before


def test_merged_files_to_check(merging, tmp_path, monkeypatch):
    """The last step looks through the merged files, whoever wrote them, and through whatever lies
    beside AVA's folders.
    """
    monkeypatch.setattr(softlink_ava, 'plots_html', lambda *_: '')  # which takes half a second
    frames = tmp_path / 'ava/rawframes'
    for name in '-5KQ66BBWC4', 'new\nline', os.fsdecode(b'\xff\xfe'), 'a (b); c':
        (frames / name).mkdir(parents=True)
    (frames / 'loop').symlink_to('loop')
    (frames / 'file').touch()
    fake_frames(merging / 'rawframes', 'aaaaaaaaaaa_000103_000107')
    (merging / 'rawframes/-5KQ66BBWC4').symlink_to('-5KQ66BBWC4')
    good = (merging / 'annotations/ava_train_v2.2.csv').read_bytes()
    rows = [f'{row}\n'.encode(errors='replace') for row in MERGED_ROWS if row]
    for name, contents in (
        ('ava_dense_proposals_train.FAIR.recall_93.9.pkl', PICKLES.values()),
        ('ava_train_v2.2.csv', [b'', b'\xff\xfe\n', *(good + row for row in rows)]),
    ):
        for content in contents:
            (merging / 'annotations' / name).write_bytes(content)
            done = here(
                'softlink_ava.py',
                f'--avakinetics_root={merging}',
                f'--ava_root={tmp_path}/ava',
                code=1,
                cwd=tmp_path,
            )
            assert 'NOT ready for training' in errors(done) and not (tmp_path / 'pwned').exists()
    assert os.readlink(merging / 'rawframes/-5KQ66BBWC4') == str(frames / '-5KQ66BBWC4')
    assert not (merging / 'rawframes/loop').exists() and not (merging / 'rawframes/file').exists()
