"""ROOT/report.html: what it says, and that a browser shows all of it at the width of a screen and
of a phone.
"""

import base64
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

import draw
import sample_world
import softlink_ava
from helpers import load, read_csv

CHROMIUM = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
# put into a copy of the page: what the browser has to say of it goes into the title
PROBE = """<script>addEventListener('load', () => {
  const images = [...document.images], root = document.documentElement;
  const fetched = performance.getEntriesByType('resource');
  document.title = JSON.stringify({
    images: images.length,
    broken: images.filter(image => !image.naturalWidth).length,
    wider: root.scrollWidth - root.clientWidth,
    narrowest: Math.min(...images.map(image => image.clientWidth)),
    outside: fetched.filter(entry => !entry.name.startsWith('data:')).length})
})</script>"""


@pytest.fixture
def root(mmaction2):
    return mmaction2.root


@pytest.fixture
def page(root):
    """What it says of training; the part that is validated on comes behind."""
    training, validation = (root / 'report.html').read_text().split('<h2>Validation on AVA')
    assert validation.count('<img') >= 12
    return training


def test_numbers_are_those_of_the_files(root, page):
    rows = read_csv(root / 'annotations/ava_train_v2.2.csv')
    kinetics = [row for row in rows if len(row[0]) > 11]
    boxes = {tuple(row[:6]) for row in rows}
    lines = [
        re.findall(r'<t[hd]>(.*?)</t[hd]>', line)
        for line in re.findall(r'<tr>.*?</tr>', page, re.S)
    ]
    cells = {line[0]: line[1:] for line in lines if line}
    proposals = load(root / 'annotations/ava_dense_proposals_train.FAIR.recall_93.9.pkl')
    assert cells['annotations'] == [
        str(len(rows) - len(kinetics)),
        str(len(kinetics)),
        str(len(rows)),
    ]
    assert cells['annotated boxes'][2] == str(len(boxes))
    assert cells['clips or movies'] == ['2', '10', '12']
    assert int(cells['proposals'][2]) <= sum(map(len, proposals.values()))
    assert ['Step 3', 'file missing', '1'] in lines
    assert not [line for line in lines if line[:1] == ['Step 5']]  # counted at Step 3
    assert 'http' not in page.replace('http://www.w3.org', '')  # nothing from elsewhere


def test_keyframes_show_annotations_and_proposals(root, page):
    pictures = re.findall(r'data:image/jpeg;base64,([^"]+)', page)
    missed = [row for row in read_csv(root / 'reports/recall_train.csv')[1:] if row[2] != row[4]]
    assert len(pictures) == len(missed) + 9 + 3  # of Kinetics and of AVA, evenly chosen
    clips = re.findall(r'<figcaption>(\S+), second', page.split('<h3>Keyframes</h3>')[1])
    assert [len(clip) > 11 for clip in clips] == [True] * 9 + [False] * 3
    sources = {
        video: (start, rate)
        for videos in sample_world.SCENES.values()
        for video, start, rate, *_ in videos
    }
    for picture, clip, second in re.findall(
        r'jpeg;base64,([^"]+)"><figcaption>(\S+), second (\d+)', page
    ):
        image = cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_COLOR)
        start, rate = sources.get(clip[:11], (900, draw.FPS))
        assert (
            abs(draw.read_stamp(image) - (int(second) - start) * float(sample_world.Fraction(rate)))
            <= 1
        )
        image = image.astype(int)
        assert image.shape[1] == 480
        for colour in softlink_ava.BLUE, softlink_ava.ORANGE:  # annotated boxes, proposals
            assert (abs(image - colour).sum(-1) < 90).sum() > 150
    plots = [
        base64.b64decode(plot).decode()
        for plot in re.findall(r'data:image/svg[+]xml;base64,([^"]+)', page)
    ]
    ticks = [set(re.findall('<!-- (.*?) -->', plot)) for plot in plots]
    assert len(ticks) == 3
    assert {
        '0 to 20 %',
        '80 to 100 %',
        "Height of the annotated boxes, as a share of the frame's",
    } <= ticks[0]
    assert {'1', '2', '3', 'Annotated people on a keyframe'} <= ticks[1]
    assert {'talk to (e.g., self, a person, a group) 79', 'AVA', 'Kinetics'} <= ticks[2]


def test_both_recalls_are_on_the_page(root, page):
    """Those of the report."""
    rows = [row[2:8] for row in read_csv(root / 'reports/recall_train.csv')[1:]]
    boxes, _, *matched = np.array(rows, int).sum(0)
    shares = [f'{count / boxes:.1%}' for count in matched]
    for name, found in ('all proposals', shares[:2]), ('those that MMAction2 keeps', shares[2:]):
        cells = ''.join(rf'\s*<td>{share}</td>' for share in found)
        assert re.search(f'<th>{name}</th>{cells}', page)


def test_numbers_stand_on_the_annotated_boxes():
    """At the feet, inside the picture; proposals have none."""
    boxes, people = [(0.1, 0.1, 0.4, 0.9)], np.array([[0.6, 0.1, 0.9, 0.9, 0.95]])
    address = softlink_ava.draw_keyframe(np.full((256, 340, 3), 128, np.uint8), boxes, people)
    data = np.frombuffer(base64.b64decode(address.split(',')[1]), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR).astype(int)
    height, width = image.shape[:2]
    coloured = abs(image - 128).max(-1) > 60
    bottom, inside = round(0.9 * height), round(0.02 * width)
    feet = slice(bottom - 28, bottom - 12)
    left, right = round(0.1 * width), round(0.6 * width)
    assert coloured[feet, left + inside // 2 : left + 3 * inside].sum() > 20
    margin = softlink_ava.INSET + 6  # of the line itself, as JPEG blurs it
    assert not coloured[feet, right + margin : right + 3 * inside].any()


@pytest.mark.skipif(not CHROMIUM, reason='needs Chromium')
@pytest.mark.parametrize('width', [1280, 400])
def test_a_browser_shows_all_of_it(root, tmp_path, width):
    page = (root / 'report.html').read_text()
    (tmp_path / 'page.html').write_text(page.replace('</head>', PROBE + '</head>'))
    done = subprocess.run(
        [
            CHROMIUM,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            f'--window-size={width},900',
            '--enable-logging=stderr',
            f'--user-data-dir={tmp_path}/profile',
            '--virtual-time-budget=5000',
            '--dump-dom',
            f'file://{tmp_path}/page.html',
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    seen = json.loads(re.search(r'<title>(.*?)</title>', done.stdout)[1])
    assert (
        seen['images'] == page.count('<img')
        and not seen['broken']
        and seen['wider'] <= 0
        and not seen['outside']
    )
    assert seen['narrowest'] >= 300 and 'CONSOLE' not in done.stderr
