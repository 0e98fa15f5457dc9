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

# Waits up to 60 s until a test holds.
wait_for() {
    for _ in $(seq 600); do
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
net)
    wait_for '[ -e /sys/class/net/eth0 ]'
    say "eth0 $(cat /sys/class/net/eth0/address) $(cat /sys/class/net/eth0/mtu)"
    ip address add 10.77.0.2/24 dev eth0
    ip link set eth0 up
    nc -l -p 7 -e cat &
    say serving
    wait
    say served
    ;;
vsock)
    guest-peer serve 1024 || say "no server"
    guest-peer ask 52 || say "no answer"
    guest-peer ask 53
    ;;
rng)
    say "rng $(cat /sys/class/misc/hw_random/rng_current)"
    head -c 65536 /dev/hwrng >/tmp/one
    head -c 65536 /dev/hwrng >/tmp/two
    if cmp -s /tmp/one /tmp/two; then differ=same; else differ=differ; fi
    say "random $(wc -c </tmp/two) $differ"
    ;;
balloon)
    # The balloon's size is the signal to go on: what it takes is no longer free.
    free() { awk '/MemFree/ {print int($2 / 1024)}' /proc/meminfo; }
    for round in 1 2; do
        dd if=/dev/zero of=/tmp/fill bs=1M count=80 2>/dev/null
        cat /bin/busybox >>/tmp/fill
        last=$(tail -c "$(wc -c </bin/busybox)" /tmp/fill | md5sum)
        if [ "$(md5sum </bin/busybox)" = "$last" ]; then right=right; else right=wrong; fi
        say "filled $round $right free=$(free)"
        [ "$round" = 1 ] || break
        wait_for '[ "$(free)" -lt 70 ]'
        rm /tmp/fill
        say freed
        wait_for '[ "$(free)" -gt 140 ]'
    done
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
