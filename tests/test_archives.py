"""Step 3 straight from archives: the same bytes as from files, through dropped connections and
broken archives.
"""

import gzip
import http.server
import io
import os
import random
import re
import subprocess
import sys
import tarfile
import threading

import decord
import pytest

import cut_kinetics
import draw
from helpers import REPO, annotation_rows, errors, here, numbered_source, read_report, snapshot

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
    """A folder of sources, the annotations, and what a list of files makes of them in root/."""
    folder = tmp_path_factory.mktemp('kinetics')
    for path, variant in SOURCES.items():
        numbered_source(folder / 'files' / path, variant)
    (folder / 'list.txt').write_text(''.join(f'files/{path} 1\n' for path in SOURCES))
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
    assert read_report(tmp_path / 'root', 'cut_kinetics_train') == [
        ['eeeeeeeeeee', '3', 'no video that could be read holds this second']
    ]
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


def test_second_run_reads_no_archive(kinetics, archives, tmp_path, monkeypatch):
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    before = snapshot(tmp_path / 'root')
    monkeypatch.delattr(cut_kinetics, 'read_members')
    done = cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert ': 0 new,' in done.stdout and snapshot(tmp_path / 'root') == before


def test_a_truncated_archive_costs_no_finished_clip(kinetics, archives, tmp_path):
    whole = archives[0].read_bytes()
    with tarfile.open(archives[0]) as tar:
        last = tar.getmembers()[-1]
    archives[0].write_bytes(whole[: last.offset_data + last.size // 2])
    done = cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives, code=1)
    assert (tmp_path / 'root/videos/aaaaaaaaaaa_000101_000109.mp4').exists()
    message = errors(done)
    assert message.startswith('error: archives that cannot be read to the end: 1 of 3, first ')
    assert f'{archives[0]}: ' in message and 'unexpected end of data' in message
    rows = read_report(tmp_path / 'root', 'cut_kinetics_train')
    assert [row[2].split(':')[0] for row in rows if not row[0]] == ['unreadable archive']
    archives[0].write_bytes(whole)
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_a_damaged_header_is_no_end(kinetics, archives, tmp_path):
    """The archive is reported, and read again when it is whole."""
    whole = archives[2].read_bytes()
    with tarfile.open(archives[2]) as tar:
        last = tar.getmembers()[-1].offset
    archives[2].write_bytes(whole[:last] + b'\xff' * 512 + whole[last + 512 :])
    done = cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives, code=1)
    assert '3.tar: ' in errors(done) and 'not a tar archive, or a damaged one' in errors(done)
    archives[2].write_bytes(whole)
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_a_clip_that_failed_at_first(kinetics, tmp_path):
    """Once it could be cut, it is cut again when it is removed.

    Its archive was replaced; the failure of before is no reason to leave it out.
    """
    name, video = 'x/ccccccccccc_000050_000060.mp4', tmp_path / 'broken.mp4'
    video.write_bytes(b'broken')
    write_tar(tmp_path / 'a.tar', {name: video})
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', tmp_path / 'a.tar', code=1)
    write_tar(tmp_path / 'a.tar', {name: kinetics / 'files' / name})
    for _ in range(2):
        cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', tmp_path / 'a.tar')
        (clip,) = (tmp_path / 'root/videos').iterdir()
        clip.unlink()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves a folder with byte ranges; every third answer breaks off in the middle."""

    protocol_version, folder, random, answers = 'HTTP/1.1', None, random.Random(3), 0

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.folder / self.path.rsplit('/', 1)[-1]  # a proxy is asked for whole URLs
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


@pytest.fixture
def server(tmp_path):
    handler = type('Here', (Flaky,), dict(folder=tmp_path))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_over_http_with_dropped_connections(kinetics, archives, server, tmp_path):
    urls = [f'http://127.0.0.1:{server.server_port}/{path.name}' for path in archives]
    urls.append(f'{urls[0]}.gone')
    done = cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *urls, code=1)
    assert server.RequestHandlerClass.answers >= 3
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')
    assert f'cannot be read to the end: 1 of 4, first {urls[3]}' in errors(done)


def test_through_the_proxy_that_the_environment_names(
    kinetics, archives, server, tmp_path, monkeypatch
):
    monkeypatch.setenv('http_proxy', f'http://127.0.0.1:{server.server_port}')
    urls = [f'http://nowhere.invalid/{path.name}' for path in archives]
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', *urls)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def write_whole(kinetics, path, mode: str) -> bytes:
    """All sources as one archive, whose content is returned."""
    with tarfile.open(path, mode) as tar:
        for name in SOURCES:
            tar.add(kinetics / 'files' / name, name)
    return path.read_bytes()


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:bz2', 'w:xz'])
def test_compressions(kinetics, tmp_path, mode):
    write_whole(kinetics, tmp_path / 'all', mode)
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', tmp_path / 'all')
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_a_gzip_of_several_members(kinetics, tmp_path):
    """As pigz and bgzip write it; tarfile alone stops behind the first."""
    data = write_whole(kinetics, tmp_path / 'all.tar', 'w')
    pieces = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
    (tmp_path / 'all.tar.gz').write_bytes(b''.join(map(gzip.compress, pieces)))
    cut_archives(kinetics, tmp_path / 'root', '--kinetics_archives', tmp_path / 'all.tar.gz')
    assert len(pieces) > 2
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def cut_stdin(kinetics, root, producer: str, **options) -> subprocess.CompletedProcess:
    """Step 3 on what a shell command writes."""
    script = f'{sys.executable} {REPO}/cut_kinetics.py --kinetics_archives -'
    return subprocess.run(
        f'{producer} | {script} --avakinetics_anotation={kinetics}/notes --avakinetics_root={root}',
        shell=True,
        capture_output=True,
        text=True,
        **options,
    )


def test_pieces_of_one_archive_through_standard_input(kinetics, tmp_path):
    """The form in which MMAction2's download brings Kinetics-700."""
    data = write_whole(kinetics, tmp_path / 'all.tar.gz', 'w:gz')
    (tmp_path / 'raw').mkdir()
    for index in range(3):
        piece = data[index * len(data) // 3 : (index + 1) * len(data) // 3]
        (tmp_path / f'raw/Kinetics700.tar.gz.{index:02d}').write_bytes(piece)
    for said in ': 5 new, 0 existing', ': 0 new, 5 existing':
        done = cut_stdin(kinetics, tmp_path / 'root', f'cat {tmp_path}/raw/*.tar.gz*')
        assert done.returncode == 0 and said in done.stdout, done.stderr
        assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')
    (tmp_path / 'raw/Kinetics700.tar.gz.02').unlink()
    done = cut_stdin(kinetics, tmp_path / 'root', f'cat {tmp_path}/raw/*.tar.gz*')
    assert (
        done.returncode == 1
        and 'cannot be read to the end: 1 of 1, first -: EOFError' in errors(done)
    )


def test_the_documented_command_for_pieces(kinetics, tmp_path):
    write_whole(kinetics, tmp_path / 'raw.tar.gz', 'w:gz')
    (tmp_path / 'raw').mkdir()
    (tmp_path / 'raw.tar.gz').rename(tmp_path / 'raw/Kinetics700.tar.gz.00')
    block = re.search(r'^RAW=.*?(?=^```)', (REPO / 'docs/small-disk.md').read_text(), re.M | re.S)
    settings = dict(AVAKINETICS_ANOTATION=f'{kinetics}/notes', AVAKINETICS_ROOT=f'{tmp_path}/root')
    command = block[0].replace('cut_kinetics.py', f'{REPO}/cut_kinetics.py')
    command = command.replace('/path/to/raw', f'{tmp_path}/raw')
    command = command.replace('python3', sys.executable)
    subprocess.run(command, shell=True, check=True, env=os.environ | settings)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_several_archives_through_standard_input(kinetics, archives, tmp_path):
    """Each has an end of its own, behind which tar itself stops."""
    zipped = tmp_path / '1.tar.gz'
    zipped.write_bytes(gzip.compress(archives[0].read_bytes()))
    third = tmp_path / '3.tar.gz'
    third.write_bytes(gzip.compress(archives[2].read_bytes()))
    done = cut_stdin(kinetics, tmp_path / 'root', f'cat {zipped} {archives[1]} {third}')
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


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
        assert draw.read_stamp(frames[7].asnumpy()) == draw.FPS + 7
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


def test_a_clip_that_spans_its_whole_source_is_not_cut_onto_it(tmp_path):
    numbered_source(tmp_path / 'source.mp4', {})
    write_tar(tmp_path / 'a.tar', {'aaaaaaaaaaa_000100_000110.mp4': tmp_path / 'source.mp4'})
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes/kinetics_train_v1.0.csv').write_text(
        annotation_rows('aaaaaaaaaaa', 101) + annotation_rows('aaaaaaaaaaa', 108)
    )
    cut_archives(tmp_path, tmp_path / 'root', '--kinetics_archives', tmp_path / 'a.tar')
    clip = decord.VideoReader(str(tmp_path / 'root/videos/aaaaaaaaaaa_000100_000110.mp4'))
    assert len(clip) == 10 * draw.FPS
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


def test_archives_are_read_again_for_new_annotations(kinetics, archives, tmp_path):
    """No clip of the old ones is cut again, and none is forgotten."""
    (tmp_path / 'notes').mkdir()
    notes = tmp_path / 'notes/kinetics_train_v1.0.csv'
    notes.write_text(ROWS)
    cut_archives(tmp_path, tmp_path / 'root', '--kinetics_archives', *archives)
    before = snapshot(tmp_path / 'root/videos')
    notes.write_text(ROWS + annotation_rows('uNwAnTeD-00', 5))
    done = cut_archives(tmp_path, tmp_path / 'root', '--kinetics_archives', archives[2])
    assert ': 1 new, 5 existing' in done.stdout, done.stdout
    assert before.items() <= snapshot(tmp_path / 'root/videos').items()
    assert (tmp_path / 'root/videos/uNwAnTeD-00_000003_000007.mp4').exists()


def test_errors_say_what_to_do(kinetics, tmp_path):
    root = tmp_path / 'root'
    for name in tmp_path / 'none.tar', 's4://bucket/x.tar', tmp_path:
        message = errors(cut_archives(kinetics, root, '--kinetics_archives', name, code=1))
        assert message.startswith(
            f'error: archives that cannot be read to the end: 1 of 1, first {name}: '
        )
        assert len(read_report(root, 'cut_kinetics_train')) == 8
    done = cut_archives(kinetics, root, '--kinetics_archives', f'@{tmp_path}/none.txt', code=2)
    assert f"error: [Errno 2] No such file or directory: '{tmp_path}/none.txt'\n" in done.stderr
