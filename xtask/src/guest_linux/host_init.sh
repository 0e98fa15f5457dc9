#!/bin/busybox sh
# First program of the emulated host: gives it /dev/kvm and runs the tests.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /run
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mkdir -p /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
npt=$(sed -n 's/.*npt=\([01]\).*/\1/p' /proc/cmdline)
while read -r module; do
    case "$module" in
    kvm-amd.ko) insmod "/modules/$module" npt="${npt:-1}" ;;
    *) insmod "/modules/$module" ;;
    esac
done </modules.list
set -- $(sed -n 's/.*tests=\([a-z0-9_,]*\).*/\1/p' /proc/cmdline | tr , ' ')
cd /tmp && /bin/linux-guests "$@" >/dev/ttyS0 2>&1
echo "host: ended with $?" >/dev/ttyS0
sync
reboot -f
