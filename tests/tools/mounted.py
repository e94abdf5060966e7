"""Run steps on a small disk that nobody else sees, gone when this program ends:

    python mounted.py MOUNT BEFORE OUT FREE_KB COMMAND...

Mounts a tmpfs of 60 MB at the folder MOUNT and copies BEFORE to MOUNT/root. FREE_KB is the free
space when COMMAND runs, or `readonly`. OUT gets the tree after that, full/, and then, with
space again, that after a second run, root/. Prints the codes and stderr of both runs as JSON. Ends
with 77 where this user may not mount.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_PRIVATE_OF_ALL = 1, 32, 0x44000
LIBC = ctypes.CDLL(None, use_errno=True)


def check(returned: int) -> None:
    if returned:
        refuse(ctypes.get_errno())


def refuse(number: int) -> NoReturn:
    print(f'no file system can be mounted here: {os.strerror(number)}', file=sys.stderr)
    sys.exit(77)


def mount(folder: Path) -> None:
    """Mount a tmpfs in a mount namespace of our own, as root or in a user namespace."""
    user, group = os.getuid(), os.getgid()
    check(LIBC.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)))
    if user:
        try:
            Path('/proc/self/setgroups').write_text('deny')
            Path('/proc/self/uid_map').write_text(f'0 {user} 1')
            Path('/proc/self/gid_map').write_text(f'0 {group} 1')
        except OSError as error:
            refuse(error.errno)
    check(LIBC.mount(None, b'/', None, MS_PRIVATE_OF_ALL, None))
    check(LIBC.mount(b'none', os.fsencode(folder), b'tmpfs', 0, b'size=60m'))


def fill(path: Path, free_kb: int) -> None:
    """Fill the disk until so many KB are left."""
    with open(path, 'wb', buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - (free_kb << 10)))


def main(folder: str, before: str, out: str, free: str, *command: str) -> None:
    folder, out, runs = Path(folder), Path(out), []
    mount(folder)
    shutil.copytree(before, folder / 'root', symlinks=True)

    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        runs.append([done.returncode, done.stderr])

    if free == 'readonly':
        options = MS_REMOUNT | MS_RDONLY
        check(LIBC.mount(b'none', os.fsencode(folder), b'tmpfs', options, b'size=60m'))
        run()
    else:
        fill(folder / 'filler', int(free))
        run()
        shutil.copytree(folder / 'root', out / 'full', symlinks=True)
        (folder / 'filler').unlink()
        run()
        shutil.copytree(folder / 'root', out / 'root', symlinks=True)
    print(json.dumps(runs))


if __name__ == '__main__':
    main(*sys.argv[1:])
