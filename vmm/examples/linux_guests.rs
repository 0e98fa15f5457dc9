//! Boots unmodified Linux guests by `trine-vmm run` and judges what they do: the tests of
//! `cargo xtask guest-linux`, which runs them in an emulated host (see `xtask/src/guest_linux`).
//!
//! Expected here: `/bin/trine-vmm`; in `/guest` the kernel as `bzimage` and as `vmlinux`, its
//! `initrd`, and an ext4 `root` disk.

use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmm::config::DiskConfig;
use vmm::control::{Client, ExitRecord};
use vmm::probe;

const VMM: &str = "/bin/trine-vmm";
const BZIMAGE: &str = "/guest/bzimage";
const VMLINUX: &str = "/guest/vmlinux";
const INITRD: &str = "/guest/initrd";
const ROOT: &str = "/guest/root";
/// `noxsave`: the emulated host's processor (QEMU 7.2) doesn't intercept XSETBV, so its KVM never learns
/// what the guest has enabled, and takes it away again at the next exit.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 noxsave";
/// The emulated host interprets its own processor: everything takes long.
const DEADLINE: Duration = Duration::from_secs(60);

type Outcome = Result<(), String>;
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

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn expect<T: PartialEq + std::fmt::Debug + ?Sized>(what: &str, is: &T, should: &T) -> Outcome {
    if is == should { Ok(()) } else { Err(format!("{what}: {is:?} instead of {should:?}")) }
}

/// What a guest has said so far.
#[derive(Default)]
struct Said {
    output: Mutex<(String, bool)>,
    more: Condvar,
}

impl Said {
    fn read(&self, mut from: impl Read) {
        let mut buffer = [0; 4096];
        loop {
            let read = from.read(&mut buffer).unwrap_or(0);
            let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
            output.0.push_str(&String::from_utf8_lossy(&buffer[..read]));
            output.1 |= read == 0;
            self.more.notify_all();
            if read == 0 {
                return;
            }
        }
    }
}

/// One guest after another, in a directory of the test's own.
struct Guest {
    directory: PathBuf,
    child: Option<Child>,
    said: Arc<Said>,
}

impl Guest {
    fn new(name: &str) -> Guest {
        let directory = std::env::temp_dir().join(name);
        let _ = std::fs::create_dir_all(&directory);
        Guest { directory, child: None, said: Arc::default() }
    }

    fn start(&mut self, kernel: &str, step: &str, extra: Value) -> Outcome {
        let mut config = json!({
            "boot": {
                "kernel": {"path": kernel},
                "initrd": {"path": INITRD},
                "cmdline": format!("{CMDLINE} step={step}"),
            },
            "control": {"path": self.directory.join("control")},
        });
        merge(&mut config, extra);
        self.run(config)
    }

    fn run(&mut self, extra: Value) -> Outcome {
        let path = |name: &str| self.directory.join(name);
        let mut config =
            json!({"version": 1, "id": "linux", "exit_record": {"path": path("exit")}});
        merge(&mut config, extra);
        std::fs::write(path("config"), config.to_string()).map_err(text)?;
        let mut child = Command::new(VMM)
            .args(["run", "--config"])
            .arg(path("config"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(text)?;
        self.said = Arc::default();
        let (stdout, said) = (child.stdout.take(), Arc::clone(&self.said));
        std::thread::spawn(move || stdout.map(|stdout| said.read(stdout)));
        self.child = Some(child);
        Ok(())
    }

    fn file(&self, name: &str, bytes: u64) -> Result<File, String> {
        let path = self.directory.join(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        file.and_then(|file| file.set_len(bytes).map(|()| file)).map_err(text)
    }

    fn client(&self) -> Result<Client, String> {
        Client::connect(&self.directory.join("control")).map_err(text)
    }

    fn said(&self) -> String {
        self.said.output.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn lines(&self) -> Vec<String> {
        self.said().lines().map(str::to_string).collect()
    }

    /// Waits for a whole line that contains `wanted`.
    fn wait_for(&self, wanted: &str) -> Result<String, String> {
        let deadline = Instant::now() + DEADLINE;
        let mut output = self.said.output.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let whole = output.0.rfind('\n').map_or("", |end| &output.0[..end]);
            if let Some(line) = whole.lines().find(|line| line.contains(wanted)) {
                return Ok(line.to_string());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if output.1 || left.is_zero() {
                let why = if output.1 { "it ended" } else { "time ran out" };
                return Err(format!("{wanted:?} was never said: {why}"));
            }
            let waited = self.said.more.wait_timeout(output, left);
            output = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the VMM's end; its exit code and its standard error.
    fn finish(&mut self) -> Result<(Option<i32>, String), String> {
        let mut child = self.child.take().ok_or("nothing runs")?;
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            match child.try_wait().map_err(text)? {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let _ = child.kill();
                    return Err("the guest did not end".into());
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let mut errors = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            let _ = stderr.read_to_string(&mut errors);
        }
        Ok((status.code(), errors))
    }

    fn ends_with(&mut self, reason: &str, code: Option<u8>) -> Outcome {
        let (status, errors) = self.finish()?;
        let record = std::fs::read(self.directory.join("exit")).map_err(text)?;
        let record: ExitRecord = serde_json::from_slice(&record)
            .map_err(|error| format!("exit record: {error}; {errors}"))?;
        let is = (record.reason.as_str(), record.code);
        expect("the exit record", &is, &(reason, code))
            .and_then(|()| match code {
                Some(code) => expect("the exit code", &status, &Some(i32::from(code))),
                None => Ok(()),
            })
            .map_err(|why| format!("{why}; {} {errors}", record.message))
    }

    /// The guest is not started, and one line says why.
    fn refused(&mut self, why: &str) -> Outcome {
        let (status, errors) = self.finish()?;
        expect("the exit code", &status, &Some(2))?;
        if errors.lines().count() != 1 || !errors.contains(why) {
            return Err(format!("{errors:?} does not say {why:?} in one line"));
        }
        expect("its control socket", &self.directory.join("control").exists(), &false)
    }

    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = remove(&self.directory);
    }
}

fn remove(directory: &Path) -> std::io::Result<()> {
    std::fs::remove_dir_all(directory)
}

fn merge(into: &mut Value, extra: Value) {
    if let (Some(into), Value::Object(extra)) = (into.as_object_mut(), extra) {
        into.extend(extra);
    }
}
