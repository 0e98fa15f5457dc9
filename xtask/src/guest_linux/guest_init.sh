#!/bin/busybox sh
# First program of an unmodified Linux guest. The command line's `step=` says what it does;
# each line that starts with "guest:" is for the test outside.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /root /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/console >/dev/console 2>&1

say() { echo "guest: $*"; }

off() {
    sync
    say off
    poweroff -f
    sleep 60
}

# Waits up to 20 s until a test holds.
wait_for() {
    for _ in $(seq 200); do
        if eval "$1"; then return 0; fi
        sleep 0.1
    done
    say "never: $1"
    off
}

while read -r module; do insmod "/modules/$module" || say "no module $module"; done </modules.list
step=$(sed -n 's/.*step=\([a-z_]*\).*/\1/p' /proc/cmdline)
say "up $step cpus=$(grep -c ^processor /proc/cpuinfo) kib=$(awk '/MemTotal/ {print $2}' /proc/meminfo)"

case "$step" in
hello)
    say "clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
    say "acpi $(ls /sys/firmware/acpi/tables | grep -c -E 'DSDT|FACP|APIC|MCFG')"
    say "lines $(grep -c -E 'ttyS0|ACPI:Ged' /proc/interrupts)"
    if [ "$(grep -c ^processor /proc/cpuinfo)" -gt 1 ]; then
        say "second $(taskset 2 awk '{print $39}' /proc/self/stat)"
    fi
    ;;
root)
    wait_for '[ -b /dev/vda ]'
    mount -t ext4 /dev/vda /root || say "no root"
    mount --move /dev /root/dev
    mount --move /proc /root/proc
    exec switch_root /root /sbin/init
    ;;
hotplug)
    say ready
    wait_for '[ -b /dev/vda ]'
    say "plugged $(cat /sys/block/vda/size) $(cat /sys/block/vda/serial)"
    say "reads $(head -c 5 /dev/vda)"
    echo WRITTEN | dd of=/dev/vda bs=512 seek=1 conv=notrunc,sync,fsync 2>/dev/null
    say used
    wait_for '[ ! -e /sys/block/vda ]'
    say unplugged
    wait_for '[ -b /dev/vda ]'
    say "again $(cat /sys/block/vda/size)"
    ;;
reboot)
    reboot -f
    sleep 60
    ;;
crash)
    echo c >/proc/sysrq-trigger
    ;;
esac
off
