"""Step 6: real detections of a real detector, equal to what mmdet gives frame by frame."""
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from mmengine import Config

import draw
import fetch_proposal
from conftest import REPO, errors, read_csv, refused, run, snapshot

TINY = [f'--config={REPO}/tests/tiny_detector.py', f'--checkpoint={REPO}/tests/tiny_detector.pth']


def fetch(root, *options, **kwargs):
    return run('fetch_proposal.py', f'--avakinetics_root={root}', *TINY, *options, **kwargs)


def load(path):
    with open(path, 'rb') as file:
        return pickle.load(file)


def overlap(a, b):
    """IoU of every box of a (n, 4) with every box of b (m, 4)."""
    corner, end = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(end - corner, 0, None).prod(-1)
    return both / ((a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1)[None] - both)


def assert_same_people(a, b):
    """As many boxes, and boxes and scores within 2e-3: batches of another make-up may round otherwise."""
    assert a.shape == b.shape
    np.testing.assert_allclose(a[a[:, 0].argsort()], b[b[:, 0].argsort()], atol=2e-3)


SIZES = [(340, 256), (426, 240), (320, 240), (456, 256)]


def write_root(root, scenes):
    """Clips of four seconds with only the frames that Step 6 reads, one annotated keyframe each."""
    rows = ''
    for scene in scenes:
        clip = f'scene-{scene:05d}_000010_000014'
        (root / 'rawframes' / clip).mkdir(parents=True)
        for second in range(4):
            image, boxes = draw.draw_frame(scene, second, SIZES[scene % 4])
            cv2.imwrite(str(root / f'rawframes/{clip}/img_{second * 30 + 1:05d}.jpg'), image)
            if second == 2:
                rows += ''.join('{},12,{:.3f},{:.3f},{:.3f},{:.3f},12,-1\n'.format(clip, *box) for box in boxes)
    (root / 'kinetics_train.csv').write_text(rows)
    return root


@pytest.fixture(scope='module')
def fetched(tmp_path_factory):
    root = write_root(tmp_path_factory.mktemp('fetched'), range(70))
    return root, fetch(root, f'--preview={root}/preview.jpg')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Eight clips, 24 frames, for what needs several runs."""
    root = write_root(tmp_path_factory.mktemp('small'), range(8))
    fetch(root)
    return root


def test_keys_are_the_keyframes_and_their_neighbours(fetched):
    root, done = fetched
    proposals = load(root / 'kinetics_proposal.pkl')
    assert proposals.keys() == {f'scene-{scene:05d},{second:04d}' for scene in range(70) for second in (11, 12, 13)}
    assert '210 of 210 frames' in done.stdout and '0 of 70 annotated keyframes have no proposal' in done.stdout
    for boxes in proposals.values():
        assert boxes.dtype == np.float64 and boxes.shape[1] == 5
        assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, 4] > 0.7).all()
    assert b'numpy._core' not in (root / 'kinetics_proposal.pkl').read_bytes()


def test_neighbours_outside_the_clip_are_left_out(tmp_path):
    root = write_root(tmp_path, [0])
    text = (root / 'kinetics_train.csv').read_text()
    (root / 'kinetics_train.csv').write_text(text.replace(',12,0', ',10,0'))
    fetch(root)
    assert load(root / 'kinetics_proposal.pkl').keys() == {'scene-00000,0010', 'scene-00000,0011'}


def test_the_drawn_people_are_found(fetched):
    proposals, good = load(fetched[0] / 'kinetics_proposal.pkl'), 0
    for scene in range(70):
        people = draw.figure_boxes(scene, 2, SIZES[scene % 4])
        found = proposals[f'scene-{scene:05d},0012'][:, :4]
        good += len(found) == len(people) and (overlap(people, found).max(1) > 0.7).all()
    assert good >= 67  # of 70, 95 %


@pytest.fixture(scope='module')
def tiny():
    from mmdet.apis import init_detector
    return init_detector(f'{REPO}/tests/tiny_detector.py', f'{REPO}/tests/tiny_detector.pth', device='cpu')


def test_boxes_are_those_of_inference_detector(fetched, tiny):
    from mmdet.apis import inference_detector
    root, proposals = fetched[0], load(fetched[0] / 'kinetics_proposal.pkl')
    for scene, second in itertools.product(range(70), (1, 2, 3)):
        path = root / f'rawframes/scene-{scene:05d}_000010_000014/img_{second * 30 + 1:05d}.jpg'
        result = inference_detector(tiny, str(path)).pred_instances.numpy()
        chosen = (result.labels == 0) & (result.scores > 0.7)
        width, height = SIZES[scene % 4]
        expected = np.hstack([np.clip(result.bboxes[chosen] / [width, height, width, height], 0, 1),
                              result.scores[chosen, None]])
        found = proposals[f'scene-{scene:05d},00{10 + second}']
        assert_same_people(found, expected)


def test_preview_shows_annotations_and_proposals(fetched):
    sheet = cv2.imread(str(fetched[0] / 'preview.jpg')).astype(int)
    assert sheet.shape == (930, 1600, 3)
    green = (abs(sheet - [80, 220, 80]).sum(-1) < 60).sum()
    orange = (abs(sheet - [0, 140, 255]).sum(-1) < 60).sum()
    assert green > 1000 and orange > 1000


def test_second_run_changes_nothing_and_another_detector_does_not_mix(small, tmp_path):
    root = tmp_path / 'root'
    shutil.copytree(small, root)
    before = snapshot(root)
    assert 'nothing to do' in fetch(root).stdout
    assert snapshot(root) == before
    (root / 'kinetics_proposal.pkl.inputs.json').write_text('{"torn')
    assert '24 of 24 frames' in fetch(root).stdout and snapshot(root) == before
    (root / 'kinetics_proposal.pkl').write_bytes(b'of another program')
    assert '24 of 24 frames' in fetch(root).stdout and snapshot(root) == before
    other = torch.load(f'{REPO}/tests/tiny_detector.pth', weights_only=True)
    other['state_dict'] = {'module.' + name: value * (0 if 'fc_cls' in name else 1)  # saved by data parallel training
                           for name, value in other['state_dict'].items()}
    torch.save(other, tmp_path / 'blind.pth')
    done = run('fetch_proposal.py', f'--avakinetics_root={root}', TINY[0], f'--checkpoint={tmp_path}/blind.pth')
    assert '0 people on 0 of 24 frames' in done.stdout and '8 of 8 annotated keyframes' in done.stdout
    assert load(root / 'kinetics_proposal.pkl') == {}


def test_unreadable_frames_cost_themselves_only(small, tmp_path):
    root = tmp_path / 'root'
    shutil.copytree(small, root)
    frames = root / 'rawframes'
    (frames / 'scene-00000_000010_000014/img_00061.jpg').unlink()
    whole = (frames / 'scene-00001_000010_000014/img_00061.jpg').read_bytes()
    (frames / 'scene-00001_000010_000014/img_00061.jpg').write_bytes(whole[:len(whole) // 2])
    (frames / 'scene-00002_000010_000014/img_00061.jpg').write_bytes(b'no picture\xff\xd9')
    lines = len(read_csv(root / 'kinetics_train.csv'))
    with open(root / 'kinetics_train.csv', 'a') as file:
        file.write('scene-00003_000010_000014,x,0,0,1,1,12,-1\nscene-00003_000010_000014,99,0,0,1,1,12,-1\n')
    done = fetch(root, '--overwrite')
    assert read_csv(root / 'reports/fetch_proposal_train.csv')[1:] == [
        ['scene-00000', '0012', 'unreadable frame: No such file or directory scene-00000_000010_000014/img_00061.jpg'],
        ['scene-00001', '0012', 'unreadable frame: truncated or no JPEG scene-00001_000010_000014/img_00061.jpg'],
        ['scene-00002', '0012', 'unreadable frame: broken JPEG scene-00002_000010_000014/img_00061.jpg'],
        *(['', '', f'malformed row: line {lines + extra} of kinetics_train.csv'] for extra in (1, 2))]
    assert '21 of 24 frames' in done.stdout
    expected = load(small / 'kinetics_proposal.pkl')
    for key, boxes in load(root / 'kinetics_proposal.pkl').items():
        assert_same_people(boxes, expected[key])
    before = snapshot(root)
    assert '3 unreadable frames are tried again' in fetch(root).stdout
    assert snapshot(root) == before
    for scene in range(3):
        name = f'rawframes/scene-{scene:05d}_000010_000014/img_00061.jpg'
        shutil.copy(small / name, root / name)
    fetch(root)
    mended = load(root / 'kinetics_proposal.pkl')
    assert mended.keys() == expected.keys()
    for key, boxes in mended.items():
        assert_same_people(boxes, expected[key])


def test_a_failing_model_ends_the_run_with_what_was_saved(fetched, tmp_path):
    """A head that breaks on tall pictures only: the shard before stays, the same command continues."""
    root = write_root(tmp_path / 'root', range(3))
    (tmp_path / 'failing.py').write_text(f"""_base_ = '{REPO}/tests/tiny_detector.py'
custom_imports = dict(imports=['failing_detector'])
model = dict(type='FailingDetector')
""")
    (tmp_path / 'failing_detector.py').write_text("""
import os
from mmdet.models import CascadeRCNN
from mmdet.registry import MODELS
@MODELS.register_module()
class FailingDetector(CascadeRCNN):
    def predict(self, inputs, samples, **kwargs):
        if samples[0].ori_shape == (240, 320) and not os.path.exists('mended'):
            raise RuntimeError('CUDA error: an illegal memory access')
        return super().predict(inputs, samples, **kwargs)
""")
    command = ['fetch_proposal.py', f'--avakinetics_root={root}', f'--config={tmp_path}/failing.py', TINY[1]]
    options = dict(cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    assert 'the detector failed on scene-00002' in errors(run(*command, code=1, **options))
    assert not (root / 'kinetics_proposal.pkl').exists()
    (tmp_path / 'mended').touch()
    assert '9 of 9 frames' in run(*command, **options).stdout


def test_the_documented_config_is_mmdetections_model():
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    register_all_modules()
    ours = Config.fromfile(f'{REPO}/X-101-64x4d-FPN.py')
    theirs = Config.fromfile(f'{mmdet.__path__[0]}/.mim/configs/cascade_rcnn/cascade-rcnn_x101-64x4d_fpn_1x_coco.py')
    tensors = [{name: tuple(value.shape) for name, value in MODELS.build(config.model).state_dict().items()}
               for config in (ours, theirs)]
    assert tensors[0] == tensors[1] and len(tensors[0]) == 670
    assert ours.test_dataloader.dataset.pipeline == theirs.test_dataloader.dataset.pipeline


def test_the_tiny_detector_is_of_the_documented_kind():
    tiny, documented = (Config.fromfile(REPO / name).model for name in ('tests/tiny_detector.py', 'X-101-64x4d-FPN.py'))
    assert tiny.type == documented.type and len(tiny.roi_head.bbox_head) == len(documented.roi_head.bbox_head) == 3
    assert {head.num_classes for head in tiny.roi_head.bbox_head} == {80}
    assert (REPO / 'tests/tiny_detector.pth').stat().st_size < 4 * 2**20


class Evil:
    def __reduce__(self):
        return os.system, ('touch pwned',)


def test_errors_say_what_to_do_before_any_frame_is_read(fetched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert 'do Step 5' in errors(fetch(fetched[0], f'--datalist={tmp_path}/none.csv', code=1))

    def refusal(*options, root=fetched[0], config=TINY[0]):
        return refused(fetch_proposal.main, f'--avakinetics_root={root}', config, TINY[1], *options)

    assert 'do Step 3' in refusal(f'--datalist={fetched[0]}/kinetics_train.csv', root=tmp_path)
    (tmp_path / 'empty.csv').touch()
    assert 'holds no annotated keyframe' in refusal(f'--datalist={tmp_path}/empty.csv')
    assert 'set --config' in refusal('--config=none.py')
    (tmp_path / 'broken.py').write_text('model = dict(')
    assert 'is no mmdetection config' in refusal(f'--config={tmp_path}/broken.py')
    assert '--preview end in' in refusal('--preview=sheet.doc')
    assert 'set --checkpoint' in refusal('--checkpoint=none.pth')
    assert 'cannot be downloaded' in refusal('--checkpoint=http://127.0.0.1:9/x.pth')
    for content in b'', b'no checkpoint', pickle.dumps(Evil()):
        (tmp_path / 'bad.pth').write_bytes(content)
        assert 'cannot be read as weights' in refusal(f'--checkpoint={tmp_path}/bad.pth')
    torch.save(Evil(), tmp_path / 'evil.pth')
    assert 'cannot be read as weights' in refusal(f'--checkpoint={tmp_path}/evil.pth')
    assert not (tmp_path / 'pwned').exists()
    message = refusal(config=f'--config={REPO}/X-101-64x4d-FPN.py')
    assert 'does not fit the config' in message and 'backbone.' in message
    for option in '--neighbors=-1', '--batch_size=0', '--score_thr=1':
        assert 'must be' in refusal(option)


def test_killed_and_run_again(tmp_path):
    """36 frames in shards of 12: killed in the second, the first is not computed again."""
    root = write_root(tmp_path, range(12))
    program = (f'import sys; sys.path.insert(0, {str(REPO)!r}); import fetch_proposal; fetch_proposal.SHARD = 12; '
               'fetch_proposal.main()')
    command = [sys.executable, '-c', program, f'--avakinetics_root={root}', *TINY]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(root.glob('*.shards/00000000.json')):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = next(root.glob('*.shards/00000000.json'))
    kept, problems = json.loads(first.read_text())
    assert len(kept) == 12 and not problems and not (root / 'kinetics_proposal.pkl').exists()
    for person in kept[min(kept)]:
        person[4] = 0.875  # a mark that only a shard which was kept can leave
    first.write_text(json.dumps([kept, {}]))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    proposals = load(root / 'kinetics_proposal.pkl')
    assert '36 of 36 frames' in done.stdout and (proposals[min(kept)][:, 4] == 0.875).all()
    assert not list(root.glob('*.shards'))


@pytest.mark.parametrize('options', [['--batch_size=4', '--num_workers=2'], ['--batch_size=32', '--num_workers=0']])
def test_batches_give_the_same_boxes(fetched, tmp_path, options):
    """210 frames of four sizes, in batches: boxes and scores within 2e-3 of those frame by frame, and the same set."""
    fetch(fetched[0], f'--picklepath={tmp_path}/batched.pkl', *options)
    batched, single = load(tmp_path / 'batched.pkl'), load(fetched[0] / 'kinetics_proposal.pkl')
    assert batched.keys() == single.keys()
    for key, boxes in batched.items():
        assert_same_people(boxes, single[key])


def test_the_documented_architecture_in_batches(tmp_path):
    """Random weights, biased so that there are boxes: the script's batches against inference_detector frame by frame."""
    import proposals
    from mmdet.apis import inference_detector
    frames = proposals.write_frames(tmp_path, 6)
    frames = [frames[0], frames[1], frames[4]]  # two sizes
    checkpoint = proposals.random_checkpoint(REPO / 'X-101-64x4d-FPN.py', tmp_path)
    options = fetch_proposal.Options(REPO / 'X-101-64x4d-FPN.py', checkpoint, 'cpu', 0.3, False, 2, 1)
    fetch_proposal.detect_shard(tmp_path / 'shard.pkl', tmp_path, frames, options)
    model, _ = fetch_proposal.load_detector(options)
    expected = {key: fetch_proposal.people_of(inference_detector(
        model, str(tmp_path / f'rawframes/{clip}/img_{second * 30 + 1:05d}.jpg')), 0.3) for key, clip, second in frames}
    found = fetch_proposal.read_shard(tmp_path / 'shard.pkl')[0]
    assert sum(map(len, expected.values())) >= 3
    boxes, scores, alone = proposals.largest_difference(found, expected, 0.3)
    assert boxes <= 2e-3 and scores <= 2e-3 and not alone
    fetch_proposal.load_detector.cache_clear()


def test_neighbors_and_score_thr(fetched, tmp_path):
    fetch(fetched[0], f'--picklepath={tmp_path}/few.pkl', '--neighbors=0', '--score_thr=0.99')
    few, all_of_them = load(tmp_path / 'few.pkl'), load(fetched[0] / 'kinetics_proposal.pkl')
    assert few and few.keys() <= {f'scene-{scene:05d},0012' for scene in range(70)}
    for key, boxes in few.items():
        assert_same_people(boxes, all_of_them[key][all_of_them[key][:, 4] > 0.99])


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    sizes = []

    class Model:
        batch_size = 8

        def test_step(self, data):
            sizes.append(len(data['inputs']))
            if sizes[-1] > 3:
                raise torch.cuda.OutOfMemoryError('out of memory')
            return data['inputs']

    options = fetch_proposal.Options('', '', 'cpu', 0.7, False, 8, 0)
    batch = [dict(inputs=number, data_samples=None) for number in range(8)]
    assert fetch_proposal.predict(Model(), batch, options) == list(range(8))
    assert sizes == [8, 4, 2, 2, 2, 2]
    monkeypatch.setattr(Model, 'test_step', lambda self, data: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError('no')))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fetch_proposal.predict(Model(), batch, options)


def test_a_lost_gpu_gives_its_shard_to_the_others(fetched, tmp_path, capsys):
    """Two `GPUs`, one of which cannot even load the model (no such device): the other does all shards."""
    from tqdm import tqdm
    options = [fetch_proposal.Options(REPO / 'tests/tiny_detector.py', REPO / 'tests/tiny_detector.pth', device, 0.7,
                                      False, 1, 0) for device in ('cpu', 'cuda:7')]
    frames = [(f'scene-{scene:05d},0012', f'scene-{scene:05d}_000010_000014', 12) for scene in range(8)]
    shards = {tmp_path / f'{index}.pkl': frames[index:index + 2] for index in range(0, 8, 2)}
    with tqdm(total=8) as bar:
        fetch_proposal.detect_on_all(shards, fetched[0], options, bar)
    assert bar.n == 8 and 'cuda:7 is given up' in capsys.readouterr().err
    expected = load(fetched[0] / 'kinetics_proposal.pkl')
    for path, shard in shards.items():
        found, problems = fetch_proposal.read_shard(path)
        assert found.keys() == {key for key, *_ in shard} and not problems
        for key, boxes in found.items():
            assert_same_people(boxes, expected[key])
    with pytest.raises(RuntimeError, match='on every GPU'), tqdm(total=8) as bar:
        fetch_proposal.detect_on_all(shards, fetched[0], options[1:], bar)
