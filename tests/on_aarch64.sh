#!/usr/bin/env bash
# Runs tests on an emulated 64-bit ARM processor: Debian for arm64 in a folder of its own, under QEMU.
#
#     sudo tests/on_aarch64.sh FOLDER [TEST …]     # by default those of the CPU's kernels: an hour, beside other work
#
# Needs Debian's packages debootstrap, qemu-user-static and rsync, and 7 GB in FOLDER, which is kept: a second call
# only runs the tests. Emulation says that results are right, and nothing about speed.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
root=$(realpath -m "${1:?a folder for the emulated system}")
shift
(($#)) || set -- tests/test_{levels_llvm,crop_and_paste_llvm,nv12,precision_on_cpu}.py

formats=/proc/sys/fs/binfmt_misc
mountpoint --quiet $formats || mount -t binfmt_misc binfmt_misc $formats
test -e $formats/qemu-aarch64 || cat /usr/lib/binfmt.d/qemu-aarch64.conf > $formats/register

if ! test -e "$root/.whole"; then
    debootstrap --arch=arm64 --variant=minbase --include=python3-venv,python3-dev,ca-certificates bookworm "$root"
    touch "$root/.whole"
fi
mkdir -p "$root/gpupipe"
rsync --archive --delete --exclude=.git --exclude=.venv --exclude=build "$project/" "$root/gpupipe/"

trap 'for place in proc/cpuinfo proc sys dev; do umount "$root/$place" 2> /dev/null || true; done' EXIT
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --bind /dev "$root/dev"
# QEMU shows the host's. LLVM and ONNX Runtime read what the processor can do from here; this is a Neoverse V1.
cat > "$root/cpuinfo" << 'FACTS'
processor	: 0
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp asimdfhm
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x1
CPU part	: 0xd40
CPU revision	: 1

FACTS
mount --bind "$root/cpuinfo" "$root/proc/cpuinfo"

cat > "$root/steps" << 'STEPS'
set -eu
cd /gpupipe
test -e .venv/.installed || { python3 -m venv .venv; .venv/bin/pip install --quiet --editable '.[test]'; touch .venv/.installed; }
.venv/bin/python -m pytest -q -rs "$@"
STEPS
chroot "$root" env QEMU_CPU=max sh /steps "$@"
