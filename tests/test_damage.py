"""Step 3 on damaged sources: a clip shows only what was decoded without an error, or the report
says what is wrong.
"""

import random
import subprocess
import tarfile

import pytest

import damage
import draw
from helpers import (
    annotation_rows,
    clip_frames,
    here,
    numbered_source,
    numbers_between,
    read_csv,
    read_report,
)

ONE_KEY_FRAME = dict(options=('-preset', 'medium', '-g', '250'))
KEY_FRAME_A_SECOND = dict(options=('-preset', 'medium', '-g', str(draw.FPS), '-sc_threshold', '0'))


def cut_sources(
    folder, sources: dict[str, tuple[bytes, int]], suffix='mp4', archive=False
) -> dict[str, str]:
    """Run Step 3 on {video: (content, annotated second)}; returns the report's reasons by video."""
    for name in 'notes', 'videos':
        (folder / name).mkdir(exist_ok=True)
    sources = sources | dict(whole______=(drawn(folder, dict(suffix=suffix)), 5))
    files = {f'{video}_000000_000010.{suffix}': content for video, (content, _) in sources.items()}
    for name, content in files.items():
        (folder / 'videos' / name).write_bytes(content)
    (folder / 'list.txt').write_text(''.join(f'videos/{name}\n' for name in files))
    (folder / 'notes/kinetics_train_v1.0.csv').write_text(
        ''.join(annotation_rows(video, second) for video, (_, second) in sources.items())
    )
    source = [f'--kinetics_list={folder}/list.txt']
    if archive:
        with tarfile.open(folder / 'all.tar', 'w') as tar:
            for name in files:
                tar.add(folder / 'videos' / name, name)
        source = ['--kinetics_archives', folder / 'all.tar']
    here(
        'cut_kinetics.py',
        f'--avakinetics_anotation={folder}/notes',
        *source,
        f'--avakinetics_root={folder}/root',
    )
    return {row[0]: row[2] for row in read_report(folder / 'root', 'cut_kinetics_train')}


def numbers(folder, name) -> list[int]:
    return clip_frames(folder / f'root/videos/{name}.mp4')


def drawn(folder, variant) -> bytes:
    path = folder / f'drawn.{variant.get("suffix", "mp4")}'
    numbered_source(path, variant)
    return path.read_bytes()


def zeroed(content: bytes, place: float, length: int) -> bytes:
    start = int(len(content) * place)
    return content[:start] + bytes(length) + content[start + length :]


@pytest.mark.parametrize('archive', [False, True], ids=['list', 'archive'])
def test_damage_in_the_middle(tmp_path, archive):
    """It is reported with its time, and no clip shows it.

    3,000 bytes of zeros, 60 random bytes: one key frame, so that everything behind is wrong, and
    nothing before.
    """
    whole, chance = drawn(tmp_path, ONE_KEY_FRAME), random.Random(1)
    scattered = bytearray(whole)
    for _ in range(60):
        scattered[chance.randrange(len(whole) // 3, len(whole) * 2 // 3)] = chance.randrange(256)
    damaged = dict(zeroed=zeroed(whole, 0.5, 3000), scattered=bytes(scattered))
    sources = {
        f'{name[:6]}_{second:04d}': (content, second)
        for name, content in damaged.items()
        for second in range(1, 8)
    }
    reasons = cut_sources(tmp_path, sources, archive=archive)
    told = 0
    for video, (_, second) in sources.items():
        if video in reasons:
            told += 1
            assert reasons[video].startswith('damaged video: ') and ', at ' in reasons[video]
            assert float(reasons[video].rsplit(', at ', 1)[1][:-2]) < second + 2.2
            assert not list((tmp_path / 'root/videos').glob(f'{video}_*'))
        else:
            first, last = max(0, second - 2), second + 2
            assert numbers(tmp_path, f'{video}_{first:06d}_{last:06d}') == list(
                range(first * draw.FPS, last * draw.FPS)
            )
    assert 6 <= told < 14


def test_damage_before_a_key_frame_costs_no_clip_behind_it(tmp_path):
    content = zeroed(drawn(tmp_path, KEY_FRAME_A_SECOND), 0.12, 200)
    reasons = cut_sources(
        tmp_path, {f'aaaaaaaaa_{second}': (content, second) for second in range(1, 9)}
    )
    assert set(reasons) == {'aaaaaaaaa_1', 'aaaaaaaaa_2', 'aaaaaaaaa_3'}
    assert numbers(tmp_path, 'aaaaaaaaa_4_000002_000006') == numbers_between(2, 6)


def test_damage_behind_a_clip_costs_nothing(tmp_path):
    """Also in a file whose end is cut off, as by a broken download."""
    whole = drawn(tmp_path, dict(options=(*ONE_KEY_FRAME['options'], '-movflags', '+faststart')))
    reasons = cut_sources(
        tmp_path,
        {f'cut_off__0{second}': (whole[: len(whole) * 9 // 10], second) for second in (2, 5, 7)},
    )
    assert reasons == {'cut_off__07': reasons['cut_off__07']} and reasons['cut_off__07'].startswith(
        ('damaged', 'source too')
    )
    assert numbers(tmp_path, 'cut_off__05_000003_000007') == numbers_between(3, 7)


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_missing_pictures_are_told(tmp_path, suffix):
    """Pictures from second 2 to 7 are gone, the file is whole: a clip whose frames would be more
    than 0.75 s off.
    """
    hole = dict(
        options=('-vf', 'select=not(between(t\\,2\\,7))', '-fps_mode', 'vfr'), suffix=suffix
    )
    short = dict(
        options=('-vf', 'select=not(between(t\\,4\\,5.3))', '-fps_mode', 'vfr'), suffix=suffix
    )
    sources = {f'hole______{second}': (drawn(tmp_path, hole), second) for second in (1, 2, 4, 7, 9)}
    reasons = cut_sources(tmp_path, sources | {'short______': (drawn(tmp_path, short), 5)}, suffix)
    assert reasons == dict.fromkeys(
        ['hole______1', 'hole______2', 'hole______4', 'hole______7'],
        'damaged video: no frame between 2.0 and 7.0 s',
    )
    shown = numbers(tmp_path, 'short_______000003_000007')
    assert all(abs(number - due) <= 22 for due, number in enumerate(shown, 3 * draw.FPS))


def test_missing_pictures_at_the_start_are_told(tmp_path):
    late = dict(lead=3.0, seconds=7)  # the sound begins three seconds before the pictures
    reasons = cut_sources(
        tmp_path, {f'late______{second}': (drawn(tmp_path, late), second) for second in (1, 6)}
    )
    assert reasons == {'late______1': 'damaged video: no frame between 0.0 and 3.0 s'}


def test_another_copy_takes_the_place_of_a_damaged_one(tmp_path):
    whole = drawn(tmp_path, ONE_KEY_FRAME)
    for name in 'notes', 'a', 'b':
        (tmp_path / name).mkdir()
    (tmp_path / 'a/aaaaaaaaaaa_000000_000010.mp4').write_bytes(zeroed(whole, 0.3, 3000))
    (tmp_path / 'b/aaaaaaaaaaa_000000_000010.mp4').write_bytes(whole)
    (tmp_path / 'list.txt').write_text(
        'a/aaaaaaaaaaa_000000_000010.mp4\nb/aaaaaaaaaaa_000000_000010.mp4\n'
    )
    (tmp_path / 'notes/kinetics_train_v1.0.csv').write_text(annotation_rows('aaaaaaaaaaa', 7))
    here(
        'cut_kinetics.py',
        f'--avakinetics_anotation={tmp_path}/notes',
        f'--kinetics_list={tmp_path}/list.txt',
        f'--avakinetics_root={tmp_path}/root',
    )
    assert numbers(tmp_path, 'aaaaaaaaaaa_000005_000009') == numbers_between(5, 9)
    assert len(read_csv(tmp_path / 'root/reports/cut_kinetics_train.csv')) == 1


@pytest.mark.parametrize('codec', ['libx264', 'libx265'])
def test_videos_cut_out_of_open_groups(tmp_path, codec):
    """They are not damaged, though the decoder complains.

    Their first pictures refer to others that are not there, about which ffmpeg complains.
    """
    options = (
        '-c:v',
        codec,
        '-preset',
        'veryfast',
        f'-{codec[3:]}-params',
        'open-gop=1:keyint=40:bframes=5:log-level=none',
    )
    numbered_source(tmp_path / 'long.mp4', dict(seconds=20, options=options))
    subprocess.run(
        [
            draw.FFMPEG,
            '-v',
            'error',
            '-ss',
            '5',
            '-i',
            tmp_path / 'long.mp4',
            '-t',
            '10',
            '-c',
            'copy',
            tmp_path / 'open.mp4',
        ],
        check=True,
    )
    content = (tmp_path / 'open.mp4').read_bytes()
    assert not cut_sources(
        tmp_path, {f'open______{second}': (content, second) for second in (1, 5, 8)}
    )


@pytest.mark.parametrize('change,lost', [('tags', False), ('size', True)])
def test_pictures_that_change_in_the_middle(tmp_path, change, lost):
    """Other colour tags change no frame's time; another size is told."""
    second = dict(
        tags=dict(
            options=('-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709')
        ),
        size=dict(size=(240, 180)),
    )[change]
    numbered_source(tmp_path / '1.ts', dict(seconds=5, fps=25, suffix='ts'))
    numbered_source(tmp_path / '2.ts', dict(second, seconds=5, fps=25, suffix='ts', first=125))
    (tmp_path / 'parts.txt').write_text("file '1.ts'\nfile '2.ts'\n")
    subprocess.run(
        [
            draw.FFMPEG,
            '-v',
            'error',
            '-f',
            'concat',
            '-i',
            tmp_path / 'parts.txt',
            '-c',
            'copy',
            tmp_path / 'c.mp4',
        ],
        check=True,
    )
    reasons = cut_sources(tmp_path, {'changes____': ((tmp_path / 'c.mp4').read_bytes(), 5)})
    if lost:
        assert reasons == {'changes____': 'damaged video: the size of its frames changes'}
    else:
        shown = numbers(tmp_path, 'changes_____000003_000007')
        assert not reasons and all(
            abs(number - due * 25 / draw.FPS) <= 0.51
            for due, number in enumerate(shown, 3 * draw.FPS)
        )


@pytest.mark.parametrize('archive', [False, True], ids=['list', 'archive'])
@pytest.mark.parametrize('pair', ['H.264 mp4', 'HEVC mkv', 'H.264 ts'])
def test_random_damage(tmp_path, pair, archive):
    """No clip shows a wrong time unreported. A part of benchmarks/damage.py."""
    variant, chance = damage.PAIRS[pair], random.Random(f'{pair} 1')
    content, sources = drawn(tmp_path, variant), {}
    kinds = ['zeros', 'noise', 'bytes', 'cut off'] + ['lost packets'] * ('ts' in pair)
    for index in range(20):
        sources[f'damaged_{index:03d}'] = (
            damage.damage(content, kinds[index % len(kinds)], chance),
            chance.randrange(1, 9),
        )
    reasons = cut_sources(tmp_path, sources, variant.get('suffix', 'mp4'), archive)
    assert 5 < len(reasons) < 20
    for video, (_, second) in sources.items():
        if video not in reasons:
            first = max(0, second - 2)
            shown = numbers(tmp_path, f'{video}_{first:06d}_{second + 2:06d}')
            assert all(
                number < 0 or abs(number - due) <= 22
                for due, number in enumerate(shown, first * draw.FPS)
            ), video
