"""Step 3 straight from archives: the same bytes as from files, through dropped connections and broken archives."""
import http.server
import io
import random
import tarfile
import threading

import decord
import pytest

import draw
from helpers import annotation_rows, errors, numbered_source, read_csv, run, snapshot

SOURCES = {'a b (c)/aaaaaaaaaaa_000100_000110.mp4': {}, "d'e/-b_b_b_b_b__000000_000010.mkv": dict(fps=25, suffix='mkv'),
           'x/ccccccccccc_000050_000060.mp4': {}, 'y/ccccccccccc_000053_000063.mp4': {},
           'y/ddddddddddd_000000_000010.mp4': dict(seconds=4), 'z/ddddddddddd_000002_000012.mp4': {},
           'z/uNwAnTeD-00_000000_000010.mp4': {}}
ROWS = (annotation_rows('aaaaaaaaaaa', 103) + annotation_rows('aaaaaaaaaaa', 107) + annotation_rows('-b_b_b_b_b_', 9)
        + annotation_rows('ccccccccccc', 55) + annotation_rows('ccccccccccc', 59) + annotation_rows('ddddddddddd', 6)
        + annotation_rows('eeeeeeeeeee', 3))


@pytest.fixture(scope='module')
def kinetics(tmp_path_factory):
    """A folder of sources, the annotations, and what the list of files makes of them in root/."""
    folder = tmp_path_factory.mktemp('kinetics')
    for path, variant in SOURCES.items():
        numbered_source(folder / 'files' / path, variant)
    (folder / 'list.txt').write_text(''.join(f'files/{path} 1\n' for path in SOURCES))
    (folder / 'notes').mkdir()
    (folder / 'notes/kinetics_train_v1.0.csv').write_text(ROWS)
    run('cut_kinetics.py', f'--avakinetics_anotation={folder}/notes', f'--kinetics_list={folder}/list.txt',
        f'--avakinetics_root={folder}/root')
    return folder


@pytest.fixture
def archives(kinetics, tmp_path):
    """The sources in three archives, one of them compressed, with hostile members among them."""
    paths = list(SOURCES)
    for name, mode, members in (('1.tar', 'w', paths[:3]), ('2.tar.gz', 'w:gz', paths[3:5]), ('3.tar', 'w', paths[5:])):
        with tarfile.open(tmp_path / name, mode) as tar:
            for index, path in enumerate(members):
                hostile = tarfile.TarInfo(('../../climbed', '/absolute', 'dir/../../x')[index % 3]
                                          + '/ccccccccccc_000054_000057.mp4')
                hostile.size = 5
                tar.addfile(hostile, io.BytesIO(b'pwned'))
                link = tarfile.TarInfo('x/ccccccccccc_000051_000061.mp4')
                link.type, link.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)[index % 3], '/etc/passwd'
                tar.addfile(link)
                tar.add(kinetics / 'files' / path, path)
    return [tmp_path / name for name in ('1.tar', '2.tar.gz', '3.tar')]


def cut(kinetics, root, *options, **kwargs):
    return run('cut_kinetics.py', f'--avakinetics_anotation={kinetics}/notes', f'--avakinetics_root={root}', *options, **kwargs)


def test_clips_are_those_of_the_list(kinetics, archives, tmp_path):
    done = cut(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')
    assert '6 of 7 annotated keyframes' in done.stdout
    assert read_csv(tmp_path / 'root/reports/cut_kinetics_train.csv')[1:] == [
        ['eeeeeeeeeee', '3', 'video in no archive that was read']]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1.tar', '2.tar.gz', '3.tar', 'root']
    assert sorted(path.name for path in (tmp_path / 'root').iterdir()) == [
        '.cut_kinetics_train_staged', 'reports', 'videos']  # ranges of videos with several annotated seconds


def test_patterns_and_files_of_names(kinetics, archives, tmp_path):
    (tmp_path / 'names.txt').write_text(f'{tmp_path}/1.tar\n\n{tmp_path}/[23].tar*\n')
    cut(kinetics, tmp_path / 'root', '--kinetics_archives', f'@{tmp_path}/names.txt', f'{tmp_path}/*.tar')
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_second_run_reads_no_archive(kinetics, archives, tmp_path):
    cut(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    before = snapshot(tmp_path / 'root')
    for path in archives:
        path.unlink()
    done = cut(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert '0 cut now' in done.stdout and snapshot(tmp_path / 'root') == before


def test_a_truncated_archive_costs_no_finished_clip(kinetics, archives, tmp_path):
    whole = archives[0].read_bytes()
    archives[0].write_bytes(whole[:len(whole) - len(whole) // 3])
    done = cut(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    clips = {path.name for path in (tmp_path / 'root/videos').iterdir()}
    assert 'aaaaaaaaaaa_000101_000109.mp4' in clips and '1 lines or archives skipped' in done.stdout
    assert [row[2] for row in read_csv(tmp_path / 'root/reports/cut_kinetics_train.csv') if 'unreadable archive' in row[2]]
    archives[0].write_bytes(whole)
    archives[1].unlink()  # finished before, so not read again
    cut(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


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
        part = data[first:last + 1]
        type(self).answers += 1
        if self.answers % 3 == 0:
            part = part[:self.random.randrange(len(part))]
            self.close_connection = True
        self.wfile.write(part)

    def log_message(self, *_):
        pass


def test_over_http_with_dropped_connections(kinetics, archives, tmp_path):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Here', (Flaky,), dict(folder=tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = [f'http://127.0.0.1:{server.server_port}/{path.name}' for path in archives]
        done = cut(kinetics, tmp_path / 'root', '--kinetics_archives', *urls, f'{urls[0]}.gone')
    finally:
        server.shutdown()
    assert server.RequestHandlerClass.answers >= 3
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')
    assert '1 lines or archives skipped' in done.stdout


def test_short_side(kinetics, tmp_path):
    sizes = {}
    for short_side in 64, 120, 90, 500:
        root = tmp_path / str(short_side)
        cut(kinetics, root, f'--kinetics_list={kinetics}/list.txt', f'--short_side={short_side}')
        clip = root / 'videos/aaaaaaaaaaa_000101_000109.mp4'
        frames = decord.VideoReader(str(clip))
        sizes[short_side] = frames[0].shape[:2]
        assert draw.read_stamp(frames[7].asnumpy()) == 37
    assert sizes == {64: (64, 86), 90: (90, 120), 120: (120, 160), 500: (120, 160)}
    assert 'even number' in errors(cut(kinetics, tmp_path, '--short_side=255', code=1))


def test_one_archive_after_the_other(kinetics, archives, tmp_path):
    """Each may be deleted once it was read, although a later one holds a better source of a second."""
    for path in archives:
        cut(kinetics, tmp_path / 'root', '--kinetics_archives', path)
        path.unlink()
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_a_torn_ledger_is_mended(kinetics, archives, tmp_path):
    cut(kinetics, tmp_path / 'root', '--kinetics_archives', *archives[:2])
    with open(tmp_path / 'root/reports/cut_kinetics_train_archives.jsonl', 'a') as file:
        file.write('{"annotations": "torn')
    for _ in range(2):
        cut(kinetics, tmp_path / 'root', '--kinetics_archives', *archives)
    assert snapshot(tmp_path / 'root/videos') == snapshot(kinetics / 'root/videos')


def test_errors_say_what_to_do(kinetics, tmp_path):
    assert 'not one clip' in errors(cut(kinetics, tmp_path / 'root', '--kinetics_archives', tmp_path / 'none.tar', code=1))
    done = cut(kinetics, tmp_path / 'root', '--kinetics_archives', 's4://bucket/x.tar', code=1)
    assert 'not one clip' in errors(done) and '1 lines or archives skipped: unreadable archive' in done.stdout
    assert 'none.txt' in errors(cut(kinetics, tmp_path / 'root', '--kinetics_archives', f'@{tmp_path}/none.txt', code=1))
