"""Step 3 straight from archives: the same bytes as from files, through dropped connections and
broken archives.
"""

import http.server
import io
import random
import tarfile
import threading

import decord
import pytest

import draw
from helpers import (
    annotation_rows,
    clip_frames,
    errors,
    here,
    numbered_source,
    read_csv,
    read_report,
    snapshot,
)

SOURCES = {
    'a b (c)/aaaaaaaaaaa_000100_000110.mp4': {},
    "d'e/-b_b_b_b_b__000000_000010.mkv": dict(fps=25, suffix='mkv'),
    'x/ccccccccccc_000050_000060.mp4': {},
    'y/ccccccccccc_000053_000063.mp4': {},
    'y/ddddddddddd_000000_000010.mp4': dict(seconds=4),
    'z/ddddddddddd_000002_000012.mp4': {},
    'z/uNwAnTeD-00_000000_000010.mp4': {},
}
ROWS = (
    annotation_rows('aaaaaaaaaaa', 103)
    + annotation_rows('aaaaaaaaaaa', 107)
    + annotation_rows('-b_b_b_b_b_', 9)
    + annotation_rows('ccccccccccc', 55)
    + annotation_rows('ccccccccccc', 59)
    + annotation_rows('ddddddddddd', 6)
    + annotation_rows('eeeeeeeeeee', 3)
)


@pytest.fixture(scope='module')
def kinetics(tmp_path_factory):
    """A folder of sources, the annotations, and what a list of files makes of them in root/,
    without the source of c that comes in a later archive.
    """
    folder = tmp_path_factory.mktemp('kinetics')
    for path, variant in SOURCES.items():
        numbered_source(folder / 'files' / path, variant)
    (folder / 'list.txt').write_text(
        ''.join(
            f'files/{path} 1\n' for path in SOURCES if path != 'y/ccccccccccc_000053_000063.mp4'
        )
    )
    (folder / 'notes').mkdir()
    (folder / 'notes/kinetics_train_v1.0.csv').write_text(ROWS)
    here(
        'cut_kinetics.py',
        f'--avakinetics_anotation={folder}/notes',
        f'--kinetics_list={folder}/list.txt',
        f'--avakinetics_root={folder}/root',
    )
    return folder


@pytest.fixture
def archives(kinetics, tmp_path):
    """The sources in three archives, one of them compressed, with hostile members among them."""
    paths = list(SOURCES)
    for name, mode, members in (
        ('1.tar', 'w', paths[:3]),
        ('2.tar.gz', 'w:gz', paths[3:5]),
        ('3.tar', 'w', paths[5:]),
    ):
        with tarfile.open(tmp_path / name, mode) as tar:
            for index, path in enumerate(members):
                hostile = tarfile.TarInfo(
                    ('../../climbed', '/absolute', 'dir/../../x')[index % 3]
                    + '/ccccccccccc_000054_000057.mp4'
                )
                hostile.size = 5
                tar.addfile(hostile, io.BytesIO(b'pwned'))
                link = tarfile.TarInfo('x/ccccccccccc_000051_000061.mp4')
                link.type, link.linkname = (
                    (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)[index % 3],
                    '/etc/passwd',
                )
                tar.addfile(link)
                tar.add(kinetics / 'files' / path, path)
    return [tmp_path / name for name in ('1.tar', '2.tar.gz', '3.tar')]


def cut_archives(kinetics, root, *options, **kwargs):
    return here(
        'cut_kinetics.py',
        f'--avakinetics_anotation={kinetics}/notes',
        f'--avakinetics_root={root}',
        *options,
        **kwargs,
    )


def test_clips_are_those_of_the_list(kinetics, archives, tmp_path):
    done = cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')
    assert '6 of 7 annotated keyframes' in done.stdout
    # which of two archives makes a clip that both could make depends on who comes first
    rows = [
        row
        for row in read_report(tmp_path / 'root', 'cut_kinetics_train')
        if not row[2].startswith('not used')
    ]
    assert rows == [['eeeeeeeeeee', '3', 'video in no archive that was read']]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        '1.tar',
        '2.tar.gz',
        '3.tar',
        'root',
    ]
    assert sorted(path.name for path in (tmp_path / 'root').iterdir()) == ['reports', 'videos']


def test_files_of_names(kinetics, archives, tmp_path):
    (tmp_path / 'names.txt').write_text(f'{tmp_path}/1.tar\n\n{tmp_path}/2.tar.gz\n')
    cut_archives(
        kinetics,
        tmp_path / 'root',
        '--kinetics_archives',
        f'@{tmp_path}/names.txt',
        f'{tmp_path}/3.tar',
    )
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_second_run_reads_no_archive(kinetics, archives, tmp_path):
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    before = snapshot(tmp_path / 'root')
    for path in archives:
        path.unlink()
    done = cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert '0 cut now' in done.stdout and snapshot(tmp_path / 'root') == before


def test_a_truncated_archive_costs_no_finished_clip(kinetics, archives, tmp_path):
    whole = archives[0].read_bytes()
    archives[0].write_bytes(whole[: len(whole) - len(whole) // 3])
    done = cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    clips = {path.name for path in (tmp_path / 'root/videos').iterdir()}
    assert (
        'aaaaaaaaaaa_000101_000109.mp4' in clips
        and '1 more in the report: unreadable archive' in done.stdout
    )
    assert [
        row[2]
        for row in read_csv(tmp_path / 'root/reports/cut_kinetics_train.csv')
        if 'unreadable archive' in row[2]
    ]
    archives[0].write_bytes(whole)
    archives[1].unlink()  # finished before, so not read again
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_a_damaged_header_is_no_end(kinetics, archives, tmp_path):
    """The archive is reported, and read again when it is whole."""
    whole = archives[2].read_bytes()
    with tarfile.open(archives[2]) as tar:
        last = tar.getmembers()[-1].offset
    archives[2].write_bytes(whole[:last] + b'\xff' * 512 + whole[last + 512 :])
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert [
        row[2]
        for row in read_report(tmp_path / 'root', 'cut_kinetics_train')
        if 'unreadable archive' in row[2] and '3.tar' in row[2]
    ]
    archives[2].write_bytes(whole)
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_a_killed_change_of_options_goes_on(kinetics, archives, tmp_path):
    """Clips of the old options are not taken for those of the new ones."""
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    cut_archives(
        kinetics,
        tmp_path / 'root',
        '--kinetics_archives',
        archives[0],
        '--short_side=64',
        '--overwrite',
    )
    done = cut_archives(
        kinetics, tmp_path / 'root', '--kinetics_archives', *archives, '--short_side=64'
    )
    assert '1 cut now' in done.stdout
    for clip in (tmp_path / 'root/videos').glob('*.mp4'):
        assert min(decord.VideoReader(str(clip))[0].shape[:2]) == 64


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves a folder with byte ranges; every third answer breaks off in the middle."""

    protocol_version, folder, random, answers = 'HTTP/1.1', None, random.Random(3), 0

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.folder / self.path.lstrip('/')
        if not path.is_file():
            return self.send_error(404)
        data, first, last = path.read_bytes(), 0, path.stat().st_size - 1
        if 'Range' in self.headers:
            first, last = self.headers['Range'].split('=')[1].split('-')
            first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
        self.send_response(206 if 'Range' in self.headers else 200)
        self.send_header('Content-Length', str(last + 1 - first))
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Range', f'bytes {first}-{last}/{len(data)}')
        self.end_headers()
        if not body:
            return
        part = data[first : last + 1]
        type(self).answers += 1
        if self.answers % 3 == 0:
            part = part[: self.random.randrange(len(part))]
            self.close_connection = True
        self.wfile.write(part)

    def log_message(self, *_):
        pass


def test_over_http_with_dropped_connections(kinetics, archives, tmp_path):
    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), type('Here', (Flaky,), dict(folder=tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = [f'http://127.0.0.1:{server.server_port}/{path.name}' for path in archives]
        done = cut_archives(
            kinetics, tmp_path / 'root', '--kinetics_archives', *urls, f'{urls[0]}.gone'
        )
    finally:
        server.shutdown()
    assert server.RequestHandlerClass.answers >= 3
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')
    assert '1 more in the report: unreadable archive' in done.stdout


def test_short_side(kinetics, tmp_path):
    sizes = {}
    for short_side in 64, 120, 90, 500:
        root = tmp_path / str(short_side)
        cut_archives(
            kinetics, root, f'--kinetics_list={kinetics}/list.txt', f'--short_side={short_side}'
        )
        clip = root / 'videos/aaaaaaaaaaa_000101_000109.mp4'
        frames = decord.VideoReader(str(clip))
        sizes[short_side] = frames[0].shape[:2]
        assert draw.read_stamp(frames[7].asnumpy()) == 37
    assert sizes == {64: (64, 86), 90: (90, 120), 120: (120, 160), 500: (120, 160)}
    assert 'even number' in errors(cut_archives(kinetics, tmp_path, '--short_side=255', code=1))


def test_one_archive_after_the_other(kinetics, archives, tmp_path):
    """Each may be deleted once it was read, though a later one has a better source of a second."""
    for path in archives:
        cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', path)
        path.unlink()
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_a_torn_ledger_is_mended(kinetics, archives, tmp_path):
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives[:2])
    with open(tmp_path / 'root/reports/cut_kinetics_train_archives.jsonl', 'a') as file:
        file.write('{"annotations": "torn')
    for _ in range(2):
        cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def write_tar(path, members: dict, filler=0):
    """An archive of {name in it: file}, after so many bytes that nobody wants."""
    with tarfile.open(path, 'w:gz' if path.suffix == '.gz' else 'w') as tar:
        if filler:
            tarinfo = tarfile.TarInfo('filler')
            tarinfo.size = filler
            with open('/dev/zero', 'rb') as zeros:
                tar.addfile(tarinfo, zeros)
        for name, file in members.items():
            tar.add(file, name)


@pytest.fixture
def two(tmp_path):
    """One video whose pictures tell which of two archives it came from, and its annotations: the
    first archive is slow.
    """
    numbered_source(tmp_path / 'first.mp4', {})
    numbered_source(tmp_path / 'second.mp4', dict(first=1000))
    name = 'x/aaaaaaaaaaa_000100_000110.mp4'
    write_tar(tmp_path / '1.tar.gz', {name: tmp_path / 'first.mp4'}, filler=80_000_000)
    write_tar(tmp_path / '2.tar', {name: tmp_path / 'second.mp4'})
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/kinetics_train_v1.0.csv').write_text(annotation_rows('aaaaaaaaaaa', 105))
    return tmp_path


@pytest.mark.parametrize('order,expected', [('12', 90), ('21', 1090)])
def test_of_two_archives_with_one_clip_the_first_wins_whichever_ends_first(two, order, expected):
    names = {'1': '1.tar.gz', '2': '2.tar'}
    done = cut_archives(
        two,
        two / 'root',
        '--num_workers=2',
        '--kinetics_archives',
        *(two / names[number] for number in order),
    )
    assert clip_frames(two / 'root/videos/aaaaaaaaaaa_000103_000107.mp4')[0] == expected
    assert read_report(two / 'root', 'cut_kinetics_train') == [
        [
            '',
            '',
            'not used, since an earlier archive has it too: aaaaaaaaaaa_000103_000107.mp4 of '
            + names[order[1]],
        ]
    ]
    assert '1 of 1 annotated keyframes' in done.stdout


def test_a_clip_that_spans_its_whole_source_is_not_cut_onto_it(tmp_path):
    numbered_source(tmp_path / 'source.mp4', {})
    write_tar(tmp_path / 'a.tar', {'aaaaaaaaaaa_000100_000110.mp4': tmp_path / 'source.mp4'})
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/kinetics_train_v1.0.csv').write_text(
        annotation_rows('aaaaaaaaaaa', 101) + annotation_rows('aaaaaaaaaaa', 108)
    )
    cut_archives(tmp_path, tmp_path / 'root', '--kinetics_archives', tmp_path / 'a.tar')
    assert (
        len(decord.VideoReader(str(tmp_path / 'root/videos/aaaaaaaaaaa_000100_000110.mp4'))) == 300
    )
    assert not read_report(tmp_path / 'root', 'cut_kinetics_train')


def test_archives_of_one_name_are_told_apart(kinetics, archives, tmp_path):
    """Fetched, cut and deleted one after the other."""
    for path in archives:
        part = path.rename(tmp_path / ('part.tar.gz' if path.suffix == '.gz' else 'part.tar'))
        cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', part)
        part.unlink()
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')
    assert [row[0] for row in read_report(tmp_path / 'root', 'cut_kinetics_train') if row[0]] == [
        'eeeeeeeeeee'
    ]


def test_what_new_annotations_need_is_told_and_nothing_is_forgotten(kinetics, archives, tmp_path):
    """Rows are added after the archives were read and two of the three deleted."""
    (tmp_path / 'notes').mkdir()
    notes = tmp_path / 'notes/kinetics_train_v1.0.csv'
    notes.write_text(ROWS)
    cut_archives(tmp_path, tmp_path / 'root', '--kinetics_archives', *archives)
    before = snapshot(tmp_path / 'root/videos')
    notes.write_text(ROWS + annotation_rows('uNwAnTeD-00', 5) + annotation_rows('-b_b_b_b_b_', 2))
    archives[0].unlink(), archives[1].unlink()
    done = cut_archives(tmp_path, tmp_path / 'root', '--kinetics_archives', *archives)
    assert (
        '1 cut now' in done.stdout and '2 keyframes left out: archive to read again' in done.stdout
    )
    assert read_report(tmp_path / 'root', 'cut_kinetics_train')[:2] == [
        ['-b_b_b_b_b_', '2', 'archive to read again: 1.tar'],
        ['-b_b_b_b_b_', '9', 'archive to read again: 1.tar'],
    ]
    assert before.items() <= snapshot(tmp_path / 'root/videos').items()
    assert (tmp_path / 'root/videos/uNwAnTeD-00_000003_000007.mp4').exists()
    done = cut_archives(
        tmp_path, tmp_path / 'root', '--kinetics_archives', archives[2], '--overwrite'
    )
    assert (
        '2 cut now' in done.stdout and before.items() <= snapshot(tmp_path / 'root/videos').items()
    )
    assert '2 keyframes left out: archive to read again' in done.stdout


def test_errors_say_what_to_do(kinetics, tmp_path):
    assert 'not one clip' in errors(
        cut_archives(
            kinetics, tmp_path / 'root', '--kinetics_archives', tmp_path / 'none.tar', code=1
        )
    )
    done = cut_archives(
        kinetics, tmp_path / 'root', '--kinetics_archives', 's4://bucket/x.tar', code=1
    )
    assert (
        'not one clip' in errors(done) and '1 more in the report: unreadable archive' in done.stdout
    )
    assert (
        'none.txt'
        in cut_archives(
            kinetics, tmp_path / 'root', '--kinetics_archives', f'@{tmp_path}/none.txt', code=2
        ).stderr
    )
