//! Boots unmodified Linux guests by `trine-vmm run` and judges what they do: the tests of
//! `cargo xtask guest-linux`, which runs them in an emulated host (see `xtask/src/guest_linux`).
//!
//! Expected here: `/bin/trine-vmm`; in `/guest` the kernel as `bzimage` and as `vmlinux`, its
//! `initrd`, and an ext4 `root` disk.

mod devices;
mod guest;

use guest::{Guest, Outcome, expect, text};
use serde_json::json;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use vmm::config::DiskConfig;
use vmm::probe;

const BZIMAGE: &str = "/guest/bzimage";
const VMLINUX: &str = "/guest/vmlinux";
const ROOT: &str = "/guest/root";

type Test = (&'static str, fn(&mut Guest) -> Outcome);

const TESTS: &[Test] = &[
    ("bzimage_boots_and_powers_off", bzimage_boots_and_powers_off),
    ("pvh_boots_two_vcpus", pvh_boots_two_vcpus),
    ("disk_is_plugged_used_and_unplugged", disk_is_plugged_used_and_unplugged),
    ("root_disk_keeps_what_was_written", root_disk_keeps_what_was_written),
    ("reboot_is_a_reset", reboot_is_a_reset),
    ("panic_is_a_reset", panic_is_a_reset),
    ("memory_goes_on_beyond_the_hole", memory_goes_on_beyond_the_hole),
    ("pause_stops_every_vcpu", pause_stops_every_vcpu),
    ("huge_pages_are_reserved_or_refused", huge_pages_are_reserved_or_refused),
    ("cgroup_and_uid_are_the_guests_own", cgroup_and_uid_are_the_guests_own),
    ("more_vcpus_than_kvm_runs_are_refused", more_vcpus_than_kvm_runs_are_refused),
    ("a_unikernel_runs_beside", a_unikernel_runs_beside),
    ("network_is_a_tap_of_the_hosts", devices::network_is_a_tap_of_the_hosts),
    ("streams_cross_between_host_and_guest", devices::streams_cross_between_host_and_guest),
    ("random_numbers_come_from_the_host", devices::random_numbers_come_from_the_host),
    ("balloon_takes_memory_and_gives_it_back", devices::balloon_takes_memory_and_gives_it_back),
    ("free_memory_goes_back_by_itself", devices::free_memory_goes_back_by_itself),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        let start = Instant::now();
        let mut guest = Guest::new(name);
        let outcome = test(&mut guest);
        guest.end();
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("PASS {name} ({seconds:.1} s)");
            }
            Err(why) => {
                failed += 1;
                println!("FAIL {name} ({seconds:.1} s): {why}\n{}", guest.said());
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn bzimage_boots_and_powers_off(guest: &mut Guest) -> Outcome {
    guest.start(BZIMAGE, "hello", json!({"memory_mib": 128}))?;
    guest.wait_for("guest: up hello cpus=1")?;
    guest.wait_for("guest: clock kvm-clock")?;
    guest.wait_for("guest: acpi 4")?;
    guest.wait_for("guest: lines 2")?;
    guest.ends_with("power_off", Some(0))
}

fn pvh_boots_two_vcpus(guest: &mut Guest) -> Outcome {
    guest.start(VMLINUX, "hello", json!({"memory_mib": 160, "vcpus": 2}))?;
    guest.wait_for("guest: up hello cpus=2")?;
    guest.wait_for("guest: second 1")?;
    guest.ends_with("power_off", Some(0))
}

fn disk_is_plugged_used_and_unplugged(guest: &mut Guest) -> Outcome {
    guest.start(BZIMAGE, "hotplug", json!({"memory_mib": 160, "vcpus": 2}))?;
    guest.wait_for("guest: ready")?;
    let disk = guest.file("disk", 4 << 20)?;
    disk.write_all_at(b"BEGIN", 0).map_err(text)?;
    let client = guest.client()?;
    let config: DiskConfig = serde_json::from_value(
        json!({"id": "late", "source": {"raw": {"descriptor": 0}}, "serial": "serial-7"}),
    )
    .map_err(text)?;
    let plug = || client.add_disk(config.clone(), &[disk.as_fd()]).map_err(text);
    plug()?;
    guest.wait_for("guest: plugged 8192 serial-7")?;
    guest.wait_for("guest: reads BEGIN")?;
    guest.wait_for("guest: used")?;
    client.remove_disk("late").map_err(text)?;
    guest.wait_for("guest: unplugged")?;
    let mut sector = [0; 8];
    disk.read_exact_at(&mut sector, 512).map_err(text)?;
    expect("the disk's second sector", &sector, b"WRITTEN\n")?;
    plug()?;
    guest.wait_for("guest: again 8192")?;
    guest.ends_with("power_off", Some(0))
}

fn root_disk_keeps_what_was_written(guest: &mut Guest) -> Outcome {
    for starts in 1..=2 {
        let disks = json!([{"id": "root", "source": {"raw": {"path": ROOT}}}]);
        let kernel = if starts == 1 { BZIMAGE } else { VMLINUX };
        guest.start(kernel, "root", json!({"memory_mib": 128, "disks": disks}))?;
        guest.wait_for(&format!("guest: root is /dev/vda starts={starts}"))?;
        let sum = std::fs::read_to_string("/guest/payload.md5").map_err(text)?;
        guest.wait_for(&format!("guest: payload {}", sum.trim()))?;
        guest.ends_with("power_off", Some(0))?;
    }
    Ok(())
}

fn reboot_is_a_reset(guest: &mut Guest) -> Outcome {
    guest.start(BZIMAGE, "reboot", json!({"memory_mib": 128, "vcpus": 2}))?;
    guest.ends_with("reset", None)
}

fn panic_is_a_reset(guest: &mut Guest) -> Outcome {
    guest.start(VMLINUX, "crash", json!({"memory_mib": 128}))?;
    guest.wait_for("sysrq triggered crash")?;
    guest.ends_with("reset", None)
}

fn memory_goes_on_beyond_the_hole(guest: &mut Guest) -> Outcome {
    const MIB: u64 = 3400;
    guest.start(BZIMAGE, "hello", json!({"memory_mib": MIB}))?;
    let line = guest.wait_for("guest: up hello")?;
    let kib: u64 = line
        .rsplit("kib=")
        .next()
        .and_then(|kib| kib.trim().parse().ok())
        .ok_or_else(|| format!("no memory in {line:?}"))?;
    // The kernel keeps some for itself, but not the gibibyte above the hole.
    if !(MIB * 1024 - 256 * 1024..=MIB * 1024).contains(&kib) {
        return Err(format!("{kib} KiB of {MIB} MiB"));
    }
    guest.ends_with("power_off", Some(0))
}

fn pause_stops_every_vcpu(guest: &mut Guest) -> Outcome {
    guest.start(BZIMAGE, "hotplug", json!({"memory_mib": 128, "vcpus": 2}))?;
    guest.wait_for("guest: ready")?;
    let client = guest.client()?;
    client.pause().map_err(text)?;
    let disk = guest.file("disk", 4 << 20)?;
    let config: DiskConfig =
        serde_json::from_value(json!({"id": "late", "source": {"raw": {"descriptor": 0}}}))
            .map_err(text)?;
    client.add_disk(config.clone(), &[disk.as_fd()]).map_err(text)?;
    if guest.lines().iter().any(|line| line.contains("guest: plugged")) {
        return Err("a paused guest noticed its disk".into());
    }
    client.resume().map_err(text)?;
    guest.wait_for("guest: used")?;
    client.kill().map_err(text)?;
    guest.ends_with("killed", None)
}

fn huge_pages_are_reserved_or_refused(guest: &mut Guest) -> Outcome {
    let reserve = |pages: &str| std::fs::write("/proc/sys/vm/nr_hugepages", pages).map_err(text);
    reserve("0")?;
    let extra = json!({"memory_mib": 128, "huge_pages": "reserved"});
    guest.start(BZIMAGE, "hello", extra.clone())?;
    guest.refused("reserve 64 huge pages of 2 MiB (sysctl vm.nr_hugepages)")?;
    reserve("64")?;
    guest.start(BZIMAGE, "hello", extra)?;
    guest.wait_for("guest: up hello")?;
    let info = std::fs::read_to_string("/proc/meminfo").map_err(text)?;
    if !info.lines().any(|line| line.starts_with("HugePages_Free:") && !line.ends_with(" 64")) {
        return Err(format!("no huge page is in use: {info}"));
    }
    let ended = guest.ends_with("power_off", Some(0));
    reserve("0")?;
    ended
}

fn cgroup_and_uid_are_the_guests_own(guest: &mut Guest) -> Outcome {
    const UID: &str = "5000";
    let group = Path::new("/sys/fs/cgroup/limited");
    let set = |name: &str, value: &str| std::fs::write(group.join(name), value).map_err(text);
    let get = |name: &str| std::fs::read_to_string(group.join(name)).map_err(text);
    std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids").map_err(text)?;
    std::fs::create_dir_all(group).map_err(text)?;
    let sandbox = json!({"uid": 5000, "cgroups": [group]});
    let extra = json!({"memory_mib": 128, "sandbox": sandbox});

    guest.start(BZIMAGE, "hotplug", extra.clone())?;
    guest.wait_for("guest: ready")?;
    let pid = guest.client()?.status().map_err(text)?.pid;
    // KVM's own worker for this VM is there too.
    let inside = get("cgroup.procs")?;
    if !inside.lines().any(|line| line == pid.to_string()) {
        return Err(format!("{pid} is not in its cgroup: {inside:?}"));
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(text)?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    expect("its uids", &uids.split_whitespace().collect::<Vec<_>>(), &vec![UID; 4])?;
    guest.client()?.kill().map_err(text)?;
    guest.ends_with("killed", None)?;

    // Less than Linux needs: the guest's process alone is ended.
    set("memory.max", "40M")?;
    guest.start(BZIMAGE, "hello", extra)?;
    let (status, errors) = guest.finish()?;
    expect("the exit code", &status, &Some(125)).map_err(|why| format!("{why}; {errors}"))?;
    let events = get("memory.events")?;
    if !events.lines().any(|line| line == "oom_kill 1") {
        return Err(format!("the limit did not hold: {events}"));
    }
    std::fs::remove_dir(group).map_err(text)
}

fn more_vcpus_than_kvm_runs_are_refused(guest: &mut Guest) -> Outcome {
    guest.start(BZIMAGE, "hello", json!({"memory_mib": 64, "vcpus": 255}))?;
    guest.refused("vcpus: 255; at most 254")
}

fn a_unikernel_runs_beside(guest: &mut Guest) -> Outcome {
    let image = guest.directory.join("unikernel");
    std::fs::write(&image, probe::image(true, 7)).map_err(text)?;
    guest.run(json!({"memory_mib": 16, "boot": {"kernel": {"path": image}}}))?;
    guest.wait_for(probe::LINE.trim())?;
    guest.ends_with("power_off", Some(7))
}
