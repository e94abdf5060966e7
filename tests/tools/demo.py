"""`make demo`: draw a small world, run the README's commands on it as they stand there, show what
came out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import sample_world

REPO = Path(__file__).parents[2]
SCRIPTS = (
    'cut_kinetics.py',
    'extract_rgb_frames.py',
    'prepare_annotation.py',
    'fetch_proposal.py',
    'merge_annotations.py',
    'softlink_ava.py',
    'X-101-64x4d-FPN.py',
)


def readme_commands(heading: str, file: str = 'README.md') -> list[str]:
    """Return the first shell block of every section whose heading starts so: '### Step '."""
    sections = re.findall(rf'^{heading}.*?(?=^##|\Z)', (REPO / file).read_text(), re.M | re.S)
    return [
        re.search(r'^```shell\n(.*?)^```', section, re.M | re.S)[1]
        for section in sections
        if '```shell' in section
    ]


def run_readme(mmaction2: Path, show: bool) -> str:
    """Run Steps 3 to 7 of the README in a drawn world, with the tiny detector."""
    place = mmaction2 / 'tools/data/ava_kinetics'
    for script in SCRIPTS:
        shutil.copy(REPO / script, place)
    environment = {
        **os.environ,
        'MMACTION2': str(mmaction2),
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
    }
    settings = re.findall(r'^export [^&\n]*', (REPO / 'README.md').read_text(), re.M)
    settings = ''.join(f'{line}\n' for line in settings).replace(
        '/path/to/mmaction2', str(mmaction2)
    )
    settings += (
        f'export CONFIG={REPO}/tests/tiny_detector.py CHECKPOINT={REPO}/tests/tiny_detector.pth\n'
    )
    steps = readme_commands('### Step [3-7]')
    assert len(steps) == 5, steps
    said = ''
    for commands in steps:
        if show:
            print(
                '\n\033[1m'
                + '\n'.join('$ ' + line for line in commands.strip().splitlines())
                + '\033[0m',
                flush=True,
            )
        done = subprocess.run(
            ['/bin/sh', '-ec', settings + commands],
            cwd=place,
            env=environment,
            text=True,
            stdout=None if show else subprocess.PIPE,
            stderr=None if show else subprocess.STDOUT,
        )
        if done.returncode:
            sys.exit(f'error: a command of the README failed\n{done.stdout or ""}')
        said += done.stdout or ''
    return said


def show_tree(folder: Path, most: int = 6) -> None:
    """Print a folder's tree, with the first few entries of every folder."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if not path.is_dir():
            print(f'  {path.name:<58}{path.stat().st_size:>10,} bytes')
            continue
        print(f'  {path.name}/')
        entries = sorted(path.iterdir())
        for entry in entries[:most]:
            if entry.is_symlink():
                note = f'-> {os.readlink(entry)}'
            elif entry.is_dir():
                note = f'{sum(1 for _ in entry.iterdir())} frames'
            else:
                note = f'{entry.stat().st_size:,} bytes'
            print(f'    {entry.name:<56}{note:>16}')
        if len(entries) > most:
            print(f'    ... and {len(entries) - most} more')


def main() -> None:
    folder = REPO / 'demo'
    shutil.rmtree(folder, ignore_errors=True)
    mmaction2 = folder / 'mmaction2'
    print(f'drawing a small Kinetics-700 and a small AVA in {mmaction2}', flush=True)
    sample_world.draw_world(mmaction2)
    run_readme(mmaction2, show=True)
    root = mmaction2 / 'data/ava_kinetics'
    print(f'\n{root}')
    show_tree(root)
    print('\nThe broken video, the missing one and the one without people are part of the sample:')
    print(
        '  ' + (root / 'reports/cut_kinetics_train.csv').read_text().replace('\n', '\n  ').rstrip()
    )
    print(f'\nA page to look at, with numbers, plots and keyframes: {root / "report.html"}')


if __name__ == '__main__':
    main()
